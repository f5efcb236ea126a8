"""Paper and ink of the figures: colours, the head and foot that all have in common, and small marks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_file
from .compare import Comparison, Entry, Training, machine_text, prompts_text, target_text

FORMATS = ("png", "svg")
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),  # Okabe and Ito: for all kinds of eyes
    *("#7A4B94", "#8C6D31", "#3B4D61", "#B2182B", "#66A61E", "#999999"),
)
MARKERS = "osD^vPX*<>hp"
PHASE_COLOURS = {"draft": "#2B3A55", "tree": "#6C7FA3", "score": "#C9D1DE", "accept": "#B79F84", "commit": "#6E5A47"}
INK, GREY, FAINT = "#1A1A1A", "#5F6670", "#E3E6EA"
STYLE: Any = {
    "font.size": 10.5,
    "axes.edgecolor": "#9AA1AB",
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "legend.frameon": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": INK,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "svg.hashsalt": "ctc-drafter",  # the same figure gives the same file
}
WIDTH = 9.6  # inches
TOP, BOTTOM, LEGEND_ROW, EDGE = 0.82, 0.42, 0.26, 0.22  # inches: title, footer, a row of the legend, the left margin


@dataclass(frozen=True)
class Picture:
    """A figure file and what it shows."""

    path: Path
    title: str
    caption: str


class Sheets:
    """Makes figures with a common head and foot; knows each method's colour."""

    def __init__(self, comparison: Comparison, trainings: Sequence[Training], folder: Path, format: str) -> None:
        self._method_of: dict[str, str] = {}
        for entry in comparison.entries:
            self._method_of.setdefault(entry.drafter, entry.method)
        names = [entry.method for entry in comparison.entries] + [self.of_training(t) for t in trainings]
        self._place = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self._folder, self._format = folder, format
        self._foot = footer(comparison.entries)

    def colour(self, method: str) -> str:
        return COLOURS[self._place[method] % len(COLOURS)]

    def line(self, method: str) -> dict[str, Any]:
        return {"color": self.colour(method), "marker": MARKERS[self._place[method] % len(MARKERS)]}

    def of_training(self, training: Training) -> str:
        """The method whose colour the drafter's curve takes."""
        return self._method_of.get(training.drafter, training.drafter)

    def new(
        self,
        title: str,
        subtitle: str,
        *,
        height: float,
        width: float = WIDTH,
        columns: int = 1,
        sharey: bool = False,
        legend: Sequence[tuple[str, str]] = (),
        lines: bool = False,
        patches: Sequence[tuple[str, str]] = (),
    ) -> Sheet:
        """A sheet of `columns` axes, `height` inches for these alone; `legend` is (label, method) pairs."""
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        keys: list[Any] = [Patch(color=colour, label=label) for label, colour in patches]
        for label, method in legend:
            one = Line2D([], [], label=label, **self.line(method)) if lines else None
            keys.append(one or Patch(color=self.colour(method), label=label))
        longest = max((len(key.get_label()) for key in keys), default=1)
        per_row = max(1, min(len(keys), int((width - 2 * EDGE) / (0.55 + 0.075 * longest))))
        keys = [key for column in range(per_row) for key in keys[column::per_row]]  # matplotlib fills columns first
        foot = textwrap.fill(self._foot, int((width - 2 * EDGE) / 0.057))
        bottom = BOTTOM + 0.14 * foot.count("\n")
        top = TOP + LEGEND_ROW * math.ceil(len(keys) / per_row) + (0.08 if keys else 0)
        whole = top + height + bottom
        figure: Any = Figure((width, whole), dpi=200, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(rect=(0.1 / width, bottom / whole, 1 - 0.3 / width, height / whole), w_pad=0.12)
        axes = figure.subplots(1, columns, sharey=sharey, squeeze=False)[0]
        figure.text(EDGE / width, 1 - 0.2 / whole, title, fontsize=15, fontweight="bold", va="top")
        figure.text(EDGE / width, 1 - 0.52 / whole, subtitle, fontsize=10.5, color=GREY, va="top")
        figure.text(EDGE / width, 0.14 / whole, foot, fontsize=8, color=GREY, va="bottom")
        if keys:
            place = (EDGE / width, 1 - (TOP - 0.02) / whole)
            figure.legend(
                handles=keys, loc="upper left", bbox_to_anchor=place, ncols=per_row, borderpad=0, borderaxespad=0,
                handlelength=1.5, columnspacing=1.6,
            )  # fmt: skip
        return Sheet(figure, list(axes), title, self._folder, self._format)


@dataclass
class Sheet:
    figure: Any
    axes: list[Any]
    title: str
    folder: Path
    format: str

    def save(self, name: str, caption: str) -> Picture:
        """Write the figure, see `write_file`."""
        path = self.folder / f"{name}.{self.format}"
        metadata = {"Date": None} if self.format == "svg" else None
        write_file(path, lambda aside: self.figure.savefig(aside, format=self.format, metadata=metadata))
        return Picture(path, self.title, caption)


def footer(entries: Sequence[Entry]) -> str:
    """Target, dtype, prompts and machine of all entries, in one line."""

    def every(fact: Callable[[dict[str, Any]], str]) -> str:
        return " / ".join(dict.fromkeys(fact(entry.content) for entry in entries))

    return "  ·  ".join(
        [
            f"target: {every(target_text)}",
            every(lambda content: str(content["target"]["dtype"])),
            every(prompts_text),
            f"{every(lambda content: str(content['arguments']['max_new_tokens']))} new tokens",
            every(machine_text),
        ]
    )


def plain_line(axes: Any, vertical: bool = False) -> None:
    """A dashed line at 1: plain decoding, in speedup as in tau."""
    draw = axes.axvline if vertical else axes.axhline
    draw(1.0, color="#4A4F57", linewidth=1.0, linestyle=(0, (4, 3)), zorder=3)
    where = {"xycoords": ("data", "axes fraction"), "xytext": (0, 3), "ha": "center"}
    if not vertical:
        where = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "va": "center"}
    axes.annotate("plain", (1.0, 1.0), textcoords="offset points", fontsize=8.5, color="#4A4F57", **where)


def end_label(axes: Any, x: float, y: float, text: str) -> None:
    """A number at the end of a bar, on white, so that no line crosses it."""
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", bbox=white, zorder=4)


def value_of(number: float | None) -> float:
    return 0.0 if number is None else float(number)


def digits(value: float) -> str:
    return f"{value:.2f}" if value else "-"
