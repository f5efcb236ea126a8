"""Draw the pictures of how-it-works.md: `make pictures`. Every number in them comes from the package's own lattice.

Plain SVG, written by hand-sized helpers; the colours follow the reader's light or dark scheme, the card included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from ctc_drafter.acceptance import accepted_paths
from ctc_drafter.lattice.collapse import collapse
from ctc_drafter.lattice.prefix import best_tree
from ctc_drafter.tree import ROOT, DraftTree

HERE = Path(__file__).parent
WORDS = ["the", "cat", "sat", "on"]
BLANK = len(WORDS)
SILENT = "\N{EN DASH}"
"""How the pictures show the blank."""
PROBS = torch.tensor(
    [  # the   cat   sat   on    blank
        [0.60, 0.15, 0.05, 0.05, 0.15],
        [0.20, 0.45, 0.10, 0.05, 0.20],
        [0.05, 0.30, 0.35, 0.05, 0.25],
        [0.05, 0.10, 0.40, 0.25, 0.20],
    ]
)
"""The page's example: what four slots say of four words and the blank."""

STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de }
  text { fill: #1f2328; font: 15px system-ui, sans-serif; text-anchor: middle }
  .small { font-size: 12.5px }  .faint { fill: #59636e }  .left { text-anchor: start }  .mono { font-family: monospace }
  .on { fill: #ffffff }
  .edge { stroke: #b1bac4; stroke-width: 1.6; fill: none }  .path { stroke: #0969da; stroke-width: 3.2; fill: none }
  .node { fill: #f6f8fa; stroke: #8c959f; stroke-width: 1.4 }  .hit { fill: #0969da; stroke: #0969da }
  .miss { fill: #f6f8fa; stroke: #8c959f; stroke-dasharray: 4 3 }  .root { fill: #6639ba; stroke: #6639ba }
  .tip { fill: #b1bac4 }  .tip-path { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    .card { fill: #161b22; stroke: #30363d }
    text { fill: #e6edf3 }  .faint { fill: #9198a1 }  .on { fill: #ffffff }
    .edge { stroke: #545d68 }  .path { stroke: #4493f8 }  .node, .miss { fill: #21262d; stroke: #7d8590 }
    .hit { fill: #1f6feb; stroke: #4493f8 }  .root { fill: #8957e5; stroke: #8957e5 }
    .tip { fill: #545d68 }  .tip-path { fill: #4493f8 }
  }
"""


class Picture:
    """Shapes on a card of given size, lines first so that they lie below."""

    def __init__(self, width: int, height: int, label: str) -> None:
        self.size, self.label = (width, height), label
        self.lines: list[str] = []
        self.shapes: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        base = y + (4.5 if "small" in kind else 5.3)  # not dominant-baseline, which some viewers do not know
        self.shapes.append(f'<text x="{x:g}" y="{base:g}" class="{kind}">{words}</text>')

    def line(self, a: tuple[float, float], b: tuple[float, float], kind: str = "edge", gap: float = 0) -> None:
        """An arrow from a to b that stops `gap` short of both."""
        length = math.dist(a, b)
        ux, uy = (b[0] - a[0]) / length, (b[1] - a[1]) / length
        x1, y1, x2, y2 = a[0] + ux * gap, a[1] + uy * gap, b[0] - ux * gap, b[1] - uy * gap
        head = "tip-path" if kind == "path" else "tip"
        wide = 5 if kind == "path" else 4
        left = (x2 - 9 * ux - wide * uy, y2 - 9 * uy + wide * ux)
        right = (x2 - 9 * ux + wide * uy, y2 - 9 * uy - wide * ux)
        ends = f"{x2 - 7 * ux:.1f}", f"{y2 - 7 * uy:.1f}"
        self.lines.append(f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{ends[0]} {ends[1]}"/>')
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in ((x2, y2), left, right))
        self.lines.append(f'<polygon class="{head}" points="{points}"/>')

    def circle(self, x: float, y: float, r: float, kind: str = "node") -> None:
        self.shapes.append(f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{r:g}"/>')

    def box(self, x: float, y: float, width: float, height: float, kind: str = "node") -> None:
        """Centred on (x, y)."""
        place = f'x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}"'
        self.shapes.append(f'<rect class="{kind}" {place} rx="6"/>')

    def word(self, x: float, y: float, words: str, kind: str = "node", width: float = 64) -> None:
        """A box with a word in it."""
        self.box(x, y, width, 32, kind)
        self.text(x, y, words, "on" if kind in ("hit", "root") else "")

    def save(self, name: str) -> None:
        width, height = self.size
        content = "\n".join([*self.lines, *self.shapes])
        card = f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        svg = f'{head} aria-label="{self.label}">\n<style>{STYLE}</style>\n{card}\n{content}\n</svg>\n'
        (HERE / name).write_text(svg, encoding="utf-8")


def loop() -> None:
    """One verification step."""
    p = Picture(760, 250, "The loop: draft, search, score, accept, commit")
    steps = [
        (110, 70, "draft module", "N slots, one pass"),
        (380, 70, "lattice", "prefix probabilities"),
        (650, 70, "draft tree", "the budget likeliest"),
        (650, 190, "target", "root + tree, one pass"),
        (380, 190, "accept", "while it agrees"),
        (110, 190, "commit", "tokens, features, cache"),
    ]
    for (x, y, name, what), kind in zip(steps, ["node", "node", "node", "hit", "node", "node"]):
        p.box(x, y, 180, 60, kind)
        p.text(x, y - 10, name, "on" if kind == "hit" else "")
        p.text(x, y + 13, what, "small on" if kind == "hit" else "small faint")
    for a, b in zip(steps, steps[1:] + steps[:1]):
        across = a[1] == b[1]
        dx, dy = (90 if b[0] > a[0] else -90, 0) if across else (0, 30 if b[1] > a[1] else -30)
        p.line((a[0] + dx, a[1] + dy), (b[0] - dx, b[1] - dy), gap=5)
    p.text(126, 130, "features of all tokens so far, and the root", "small faint left")
    p.save("loop.svg")


def collapsing() -> None:
    """Three slot paths that spell the same text."""
    p = Picture(760, 226, "Three slot paths collapse to one text")
    paths = [[0, 1, 1, 2], [0, 0, 1, 2], [0, BLANK, 1, 2]]
    names = [*WORDS, SILENT]
    for i in range(4):
        p.text(90 + 92 * i, 28, f"slot {i + 1}", "small faint")
    p.text(590, 28, "the text they spell", "small faint")
    for row, path in enumerate(paths):
        y = 70 + 60 * row
        text = collapse(path, BLANK)
        for i, symbol in enumerate(path):
            kept = symbol != BLANK and (i == 0 or symbol != path[i - 1])
            p.word(90 + 92 * i, y, names[symbol], "hit" if kept else "miss", 76)
        p.line((412, y), (478, y))
        for k, symbol in enumerate(text):
            p.word(520 + 74 * k, y, names[symbol], "hit", 62)
    p.save("collapse.svg")


def alignments() -> None:
    """The lattice of a label: every way from its first state to its last is an alignment."""
    label = [0, 1, 2]
    slots, rows = len(PROBS), len(label)
    p = Picture(760, 356, "The lattice of alignments of the label the cat sat over four slots")

    def at(i: int, j: int) -> tuple[float, float]:
        return 190 + 130 * i, 62 + 80 * j

    shown = {(0, 0), (1, 1), (2, 1), (3, 2), (4, 3)}
    for j in range(rows + 1):
        said = " ".join(WORDS[k] for k in label[:j]) or "nothing"
        p.text(22, at(0, j)[1], f"{j}: {said}", "left" if j else "left faint")
        for i in range(j, slots + 1):
            if rows - j > slots - i:
                continue  # the rest of the label would not fit any more
            p.circle(*at(i, j), 15, "hit" if (i, j) in shown else "node")
            if i == slots:
                continue
            if j < rows and rows - j - 1 <= slots - i - 1:
                on = (i, j) in shown and (i + 1, j + 1) in shown
                p.line(at(i, j), at(i + 1, j + 1), "path" if on else "edge", 18)
                p.text(at(i, j)[0] + 80, at(i, j)[1] + 34, f"{WORDS[label[j]]} {PROBS[i, label[j]]:.2f}", "small left")
            if rows - j <= slots - i - 1:
                on = (i, j) in shown and (i + 1, j) in shown
                p.line(at(i, j), at(i + 1, j), "path" if on else "edge", 18)
                p.text(at(i, j)[0] + 62, at(i, j)[1] - 11, f"{SILENT} {PROBS[i, BLANK]:.2f}", "small faint")
    for i in range(1, slots + 1):
        p.text(at(i, 0)[0] - 65, 24, f"slot {i}", "small faint")
    p.text(380, 334, "down-right: a slot emits the next label; right: it is silent (blank)", "small faint")
    p.save("alignments.svg")


def example_tree(budget: int = 7) -> DraftTree:
    return best_tree(PROBS.log()[None], budget, pool=len(WORDS))


def children(tree: DraftTree) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents[0].tolist()):
        found.setdefault(parent, []).append(node)
    return found


def leaves_below(kids: dict[int, list[int]], node: int) -> Iterable[int]:
    if node not in kids:
        yield node
    for kid in kids.get(node, []):
        yield from leaves_below(kids, kid)


def trees() -> None:
    """The best tree of the example, and what the target accepts of it."""
    tree = example_tree()
    tokens, depths = tree.tokens[0].tolist(), tree.depths[0].tolist()
    assert tree.log_probs is not None
    probs = tree.log_probs[0].exp().tolist()
    kids = children(tree)
    text, chosen = [0, 1, 2, 3], torch.zeros(1, tree.budget + 1, dtype=torch.long)  # what the target would say
    node = ROOT
    for token in text:
        chosen[0, node + 1] = token
        node = next((kid for kid in kids.get(node, []) if tokens[kid] == token), ROOT)
    [(path, emitted)] = accepted_paths(tree, chosen)
    assert emitted == text
    on_path = {i - 1 for i in path}

    order = list(leaves_below(kids, ROOT))
    p = Picture(760, 50 + 62 * len(order), "The draft tree of the example, and the path that the target accepts")
    place: dict[int, tuple[float, float]] = {}

    def put(node: int) -> float:
        below = [put(kid) for kid in kids.get(node, [])]
        y = sum(below) / len(below) if below else 66 + 62.0 * order.index(node)
        place[node] = (70 + 150 * (0 if node == ROOT else depths[node]), y)
        return y

    put(ROOT)
    for node, (x, y) in place.items():
        if node == ROOT:
            p.word(x, y, "see", "root")
            continue
        p.word(x, y, WORDS[tokens[node]], "hit" if node in on_path else "node")
        p.text(x, y + 26, f"{probs[node]:.3f}", "small faint mono")
        px, py = place[tree.parents[0, node].item()]
        p.line((px + 33, py), (x - 33, y), "path" if node in on_path else "edge", 3)
    last = place[path[-1] - 1]
    p.line((last[0] + 33, last[1]), (last[0] + 117, last[1] + 0.1), "path", 3)
    p.word(last[0] + 150, last[1], WORDS[emitted[-1]], "root")
    p.text(last[0] + 150, last[1] + 26, "the target's own", "small faint")
    p.text(70, 24, "root", "small faint")
    for depth in range(1, max(depths) + 1):
        p.text(70 + 150 * depth, 24, f"depth {depth}", "small faint")
    p.save("tree.svg")


def mask() -> None:
    """Who sees whom in the pass that scores the tree of the example."""
    tree = example_tree()
    seen = tree.ancestor_mask()[0].tolist()
    names = ["see", *(WORDS[t] for t in tree.tokens[0].tolist())]
    size, cell = len(names), 30
    p = Picture(760, 70 + cell * size, "The ancestor mask of the draft tree")
    left, top = 250, 62
    p.box(left - 85, top + cell * size / 2 - cell / 2, 100, cell * size - 4, "miss")
    p.text(left - 85, top + cell * size / 2 - cell / 2, "context", "faint")
    for row, name in enumerate(names):
        y = top + cell * row
        p.text(84, y, name)
        p.text(left + cell * row, top - 32, name, "small")
        for column in range(size):
            p.box(left + cell * column, y, cell - 5, cell - 5, "hit" if seen[row][column] else "miss")
    p.text(530, top + 40, "Each row is a query.", "small left")
    p.text(530, top + 64, "It sees all of the context,", "small left")
    p.text(530, top + 88, "its ancestors, and itself;", "small left")
    p.text(530, top + 112, "its position is the root's", "small left")
    p.text(530, top + 136, "plus its depth.", "small left")
    p.save("mask.svg")


if __name__ == "__main__":
    for draw in (loop, collapsing, alignments, trees, mask):
        draw()
