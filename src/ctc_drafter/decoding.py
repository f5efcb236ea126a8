"""The loop: draft, score, accept, commit. Plain decoding is this loop with an empty tree; there is no other one.

`generate` runs it for one sequence; `batch.Batch` for several that come and go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .acceptance import Chooser, Sampling, accepted_paths, largest
from .cache import SlotCache
from .ending import Ending
from .errors import UserError
from .logprobs import LogProb, log_probs_of
from .memory import check_fits, spare
from .pace import Pace
from .steps import Clock, Step
from .target import Target
from .target.prefixes import Prefixes
from .tree import DraftTree

if TYPE_CHECKING:
    from .drafters import Drafter


class Row:
    """One sequence among those that are advanced together, and what it carries from pass to pass."""

    def __init__(
        self, target: Target, drafter: Drafter, sampling: Sampling, ending: Ending, log_probs: int | None = None
    ) -> None:
        """log_probs: how many of the most probable tokens to name beside each chosen one (None: tell nothing)."""
        self.drafter, self.ending = drafter, ending
        self._top = log_probs
        self.chooser = Chooser(sampling, target.device)
        self.context: list[int] = []
        """All ids up to the root."""
        self.root = torch.empty(0)
        """(1, 1)."""
        self._unseen: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Pairs of feature and next token that the drafter has not seen: (1, n, F * hidden_size) and (1, n)."""
        self._ticket = object()

    def begin(self, prompt_ids: list[int], features: torch.Tensor, root: torch.Tensor) -> list[int]:
        """The prompt is read: features (1, P, F * hidden_size), the first token chosen (1, 1); returns that token."""
        self.drafter.start(len(prompt_ids) + self.ending.limit)
        self.drafter.serves = self._ticket
        self.root = root
        known = torch.tensor([prompt_ids[1:]], dtype=torch.long, device=root.device)
        self._unseen = [(features, torch.cat([known, root], 1))]
        tokens: list[int] = root[0].tolist()
        self.context = prompt_ids + tokens
        return tokens

    def unseen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand out the pairs that the drafter has not seen. Raises UserError if it serves another sequence by now."""
        if self.drafter.serves is not self._ticket and not self.drafter.stateless:
            raise UserError("Another generation has begun with this drafter; load one drafter for each at a time.")
        pairs, self._unseen = self._unseen, []
        if len(pairs) == 1:
            return pairs[0]
        features, next_tokens = zip(*pairs)
        return torch.cat(features, 1), torch.cat(next_tokens, 1)

    def log_probs(self, logits: torch.Tensor, offsets: list[int], tokens: list[int]) -> list[LogProb] | None:
        """Of tokens chosen at the `offsets` of logits (n, V), if they were asked for."""
        if self._top is None:
            return None
        return log_probs_of(logits[offsets[: len(tokens)]], tokens, self._top)

    def commit(self, features: torch.Tensor, chosen: torch.Tensor, offsets: list[int], tokens: list[int]) -> None:
        """Go on after the accepted path `offsets`: features (1, M+1, F * hidden_size) and chosen tokens (1, M+1)."""
        if not self.drafter.feature_layers:
            features = features[..., :0]  # other rows of the pass may have asked for some
        kept = torch.tensor(offsets, device=chosen.device)
        next_tokens = chosen.index_select(1, kept)
        if self.drafter.stateless:
            self._unseen.clear()
        self._unseen.append((features.index_select(1, kept), next_tokens))
        self.root = next_tokens[:, -1:]
        self.context += tokens


class Loop:
    """The loop over passes of the target, for one row or several: draft, score, accept, commit.

    Rows join and leave between passes. What a row emits does not depend on the others. All drafters must read the same
    feature layers, or none.
    """

    def __init__(self, target: Target, budget: int, max_rows: int = 1, prefixes: Prefixes | None = None) -> None:
        """budget: the most draft nodes of a row that `step` will be asked for; max_rows: the most rows at a time.

        prefixes: where what is read of prompts is kept for others (None: nowhere).
        """
        self.target, self.budget, self.max_rows, self.prefixes = target, budget, max_rows, prefixes
        self.rows: list[Row] = []
        self.cache: SlotCache | None = None
        """None while there are no rows, so that an idle loop holds no memory."""

    def join(self, row: Row, prompt_ids: list[int], clock: Clock, on_read: Callable[[int], None] | None = None) -> Step:
        """Read the prompt of a new row; its first token comes from that. on_read: see `Target.prefill`."""
        target = self.target
        capacity = len(prompt_ids) + row.ending.limit + spare(self.budget)
        if self.cache is None:
            self.cache, place = target.new_cache(capacity), 0
        else:
            place = self.cache.claim(capacity, self.max_rows)
        self.rows.append(row)
        try:
            target.capture(row.drafter.feature_layers)
            known = self.prefixes.find(prompt_ids, target.layers) if self.prefixes is not None else None
            logits, features = target.prefill(prompt_ids, self.cache, place, on_read=on_read, known=known)
            if self.prefixes is not None:
                count = 0 if known is None else len(known.ids)
                self.prefixes.add(prompt_ids, target.layers, self.cache, place, features, count)
            empty = DraftTree.empty(1, target.device)
            root = row.chooser.choose(logits[:, None], empty, empty.ancestor_mask(), prompt_ids)
            tokens = row.begin(prompt_ids, features, root)
        except BaseException:
            self.leave(row)
            raise
        clock.lap("prefill")
        emitted, finish = row.ending.cut(tokens)
        return Step(emitted, 0, 0, clock.seconds, finish, log_probs=row.log_probs(logits, [0], emitted))

    def leave(self, row: Row) -> None:
        """Free the row's place, if it has one; the last row moves into it."""
        if row not in self.rows:
            return
        place = self.rows.index(row)
        last = self.rows.pop()
        if last is not row:
            self.rows[place] = last
        if not self.rows:
            self.cache = None
        elif self.cache is not None:
            self.cache.release(place)

    def step(self, budget: int, clock: Clock) -> list[tuple[Row, Step]]:
        """Advance every row by one pass of the target, with up to `budget` draft nodes each.

        Without a budget nothing is drafted; the drafters catch up when they are asked again. A row whose drafter fails
        leaves, and its Step says so; raises whatever else happens.
        """
        trees, steps = self._draft(budget, clock)
        if not self.rows:
            return steps
        rows, target, cache = self.rows, self.target, self.cache
        assert cache is not None
        tree, budgets = DraftTree.stack(trees), [tree.budget for tree in trees]
        ancestors = tree.ancestor_mask()
        # Another generation may have run since the last pass; a row without a drafter among others needs no features.
        target.capture(max((row.drafter.feature_layers for row in rows), key=len))
        roots = rows[0].root if len(rows) == 1 else torch.cat([row.root for row in rows])
        logits, features = target.score(roots, tree, ancestors, cache)
        clock.lap("score")
        chosen = self._choose(logits, trees, ancestors)
        paths = accepted_paths(tree, chosen, budgets)
        clock.lap("accept")
        cache.keep([offsets for offsets, _ in paths])
        own = zip(features.split(1), chosen.split(1)) if len(rows) > 1 else [(features, chosen)]
        for row, (mine, choices), (offsets, tokens) in zip(rows, own, paths):
            row.commit(mine, choices, offsets, tokens)
        clock.lap("commit")
        for i, (row, scored, (offsets, tokens)) in enumerate(zip(rows, trees, paths)):
            emitted, finish = row.ending.cut(tokens)
            accepted = min(len(emitted), len(tokens) - 1)
            told = row.log_probs(logits[i], offsets, emitted)
            nodes = [offset - 1 for offset in offsets[1:]]
            step = Step(emitted, accepted, scored.budget, clock.seconds, finish, scored, log_probs=told, nodes=nodes)
            steps.append((row, step))
        return steps

    def _draft(self, budget: int, clock: Clock) -> tuple[list[DraftTree], list[tuple[Row, Step]]]:
        """A tree for each row that stays, and the last steps of those whose drafters failed."""
        groups = self._groups() if budget else []
        made: dict[Row, Any] = {}
        for rows in groups:
            made |= _by_row(rows, _guesses)
        clock.lap("draft")
        for rows in groups:
            if not isinstance(made[rows[0]], Exception):
                made |= _by_row(rows, _trees, [made[row] for row in rows], budget)
        if not budget:
            made = {row: DraftTree.empty(1, self.target.device) for row in self.rows}
        clock.lap("tree")
        failed = [(row, Step.failed(error)) for row, error in made.items() if isinstance(error, Exception)]
        for row, _ in failed:
            self.leave(row)
        return [made[row] for row in self.rows], failed

    def _groups(self) -> list[list[Row]]:
        """The rows that are drafted for at once: twins, if they can draft together, else each by itself."""
        groups: defaultdict[object, list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[row.drafter.lineage if row.drafter.drafts_together else row].append(row)
        return list(groups.values())

    def _choose(self, logits: torch.Tensor, trees: list[DraftTree], ancestors: torch.Tensor) -> torch.Tensor:
        """The tokens that each row chooses after its root and its nodes: logits (B, M+1, V) -> (B, M+1)."""
        rows = self.rows
        if len(rows) == 1:
            return rows[0].chooser.choose(logits, trees[0], ancestors, rows[0].context)
        chosen = largest(logits)
        for i, (row, tree) in enumerate(zip(rows, trees)):
            if not row.chooser.is_argmax:
                size = tree.budget + 1
                own = logits[i : i + 1, :size], tree, ancestors[i : i + 1, :size, :size]
                chosen[i : i + 1, :size] = row.chooser.choose(*own, row.context)
        return chosen


def _guesses(rows: list[Row]) -> list[Any]:
    pairs = [row.unseen() for row in rows]
    if len(rows) == 1:
        return [rows[0].drafter.draft(*pairs[0])]
    return rows[0].drafter.draft_together([row.drafter for row in rows], pairs)


def _trees(rows: list[Row], guesses: list[Any], budget: int) -> list[DraftTree]:
    if len(rows) == 1:
        return [rows[0].drafter.tree(guesses[0], budget)]
    return rows[0].drafter.trees_together([row.drafter for row in rows], guesses, budget)


def _by_row(rows: list[Row], work: Callable[..., list[Any]], *arguments: Any) -> dict[Row, Any]:
    """What work(rows, *arguments) returns for each row, or the exception that it raises for all of them."""
    try:
        return dict(zip(rows, work(rows, *arguments), strict=True))
    except Exception as error:
        return dict.fromkeys(rows, error)


@torch.inference_mode()
def generate(
    target: Target,
    drafter: Drafter,
    prompt_ids: list[int],
    *,
    max_new_tokens: int = 128,
    budget: int = 8,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    profile: bool = False,
    on_read: Callable[[int], None] | None = None,
    memory_limit: int | None = None,
    log_probs: int | None = None,
    pace: Pace | None = None,
) -> Iterator[Step]:
    """Generate tokens after `prompt_ids`, one Step per pass of the target.

    Ends at one of the target's stop ids (emitted), after a `stop` string, after `max_new_tokens`, or at the context's
    edge. Greedy output equals the target's own, sampled output has its distribution, whatever the drafter; with a seed
    the sample is the one that plain decoding draws. `profile` waits for the GPU at each phase, so that the times of the
    phases are true there. `on_read` is told how many tokens of the prompt are read, as they are. `memory_limit`: bytes
    that keys and values may take. With `log_probs` steps tell the target's log probabilities of their tokens, and so
    many of the most probable ones. With a `pace`, made for this budget and kept from call to call, each pass drafts as
    much as was found to be fastest, or nothing. Raises UserError for an empty or too long prompt, and one that may not
    fit.
    """
    ending = Ending.of(target, prompt_ids, max_new_tokens, stop)
    if budget < 0:
        raise UserError(f"budget must be at least 0, not {budget}.")
    check_fits(target, drafter, len(prompt_ids), ending.limit, budget, memory_limit)
    row = Row(target, drafter, sampling or Sampling(), ending, log_probs)
    loop = Loop(target, budget)
    with target.turn:
        step = loop.join(row, prompt_ids, Clock(target.device, profile), on_read)
    yield step
    while step.finish is None:
        chosen = budget if pace is None else pace.choose(1, budget)
        with target.turn:
            [(_, step)] = loop.step(chosen, Clock(target.device, profile))
        if step.error is not None:
            raise step.error
        if pace is not None:
            pace.learn(chosen, [step], sum(step.seconds.values()))
        yield step
