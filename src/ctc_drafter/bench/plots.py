"""Figures of a comparison. One colour and marker per method, the same in every figure."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
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


def check_plots() -> None:
    """Raise UserError if matplotlib, an optional extra, is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "Figures need matplotlib: pip install 'ctc-drafter[plots]', or pass --no-figures for the text alone."
        ) from None


def draw_all(comparison: Comparison, trainings: Sequence[Training], folder: Path, format: str) -> list[Picture]:
    """Draw every figure that the data allow into `folder`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        sheets = _Sheets(comparison, trainings, folder, format)
        drawn = [
            draw_speedup(sheets, comparison),
            draw_categories(sheets, comparison),
            draw_acceptance(sheets, comparison),
            draw_time(sheets, comparison),
            draw_budgets(sheets, comparison),
            draw_training(sheets, trainings),
        ]
    return [picture for picture in drawn if picture is not None]


# ---------------------------------------------------------------- the figures


def draw_speedup(sheets: _Sheets, comparison: Comparison) -> Picture:
    """Bars: speedup and tau of each method at its best budget."""
    best = comparison.best()[::-1]
    sheet = sheets.new(
        "Speedup and tau of each method",
        "Each method at its fastest budget; speedup over plain decoding, tau in tokens per pass of the target",
        height=0.9 + 0.42 * len(best),
        columns=2,
        sharey=True,
    )
    for axes, key, unit in zip(sheet.axes, ("speedup", "tau"), ("times plain decoding", "tokens per target pass")):
        values = [_value(entry.totals[key]) for entry in best]
        axes.barh([entry.label for entry in best], values, height=0.62, color=[sheets.colour(e.method) for e in best])
        _plain_line(axes, vertical=True)
        for i, value in enumerate(values):
            _end_label(axes, value, i, _digits(value))
        axes.set_xlim(0, 1.13 * max(1.0, *values))
        axes.set_ylim(-0.62, len(best) - 0.38)
        axes.set_xlabel(f"{key} ({unit})")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    return sheet.save("speedup", "Speedup over plain decoding and tau, at each method's fastest budget.")


def draw_categories(sheets: _Sheets, comparison: Comparison) -> Picture | None:
    """Grouped bars: tau per category, the paper's Figure 2; the last group is all prompts together."""
    categories, best = comparison.categories(), comparison.best()
    if len(categories) < 2:
        return None
    sheet = sheets.new(
        "Tau in each category of prompts",
        "Tokens per pass of the target, each method at its fastest budget",
        height=3.7,
        width=min(11.0, max(WIDTH, 1.6 + len(categories) * (0.25 + 0.13 * len(best)))),
        legend=[(entry.label, entry.method) for entry in best],
    )
    (axes,) = sheet.axes
    places = [*range(len(categories)), len(categories) + 0.35]
    bar = 0.8 / len(best)
    for i, entry in enumerate(best):
        groups = [entry.totals["categories"].get(name, {}) for name in categories] + [entry.totals]
        heights = [_value(group.get("tau")) for group in groups]
        xs = [place + (i - (len(best) - 1) / 2) * bar for place in places]
        axes.bar(xs, heights, 0.88 * bar, color=sheets.colour(entry.method))
        if len(best) * len(places) <= 24:
            for x, height in zip(xs, heights):
                axes.annotate(
                    _digits(height), (x, height), (0, 3), textcoords="offset points", ha="center", fontsize=8.5
                )
    axes.set_xticks(places, [*categories, "all"])
    axes.get_xticklabels()[-1].set_fontweight("bold")
    if len(categories) > 9:
        axes.tick_params(axis="x", rotation=30)
        for label in axes.get_xticklabels():
            label.set_ha("right")
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.set_ylabel("tau (tokens per target pass)")
    axes.margins(x=0.01)
    axes.grid(axis="y")
    _plain_line(axes)
    return sheet.save("categories", "Tau per category, at each method's fastest budget.")


def draw_acceptance(sheets: _Sheets, comparison: Comparison) -> Picture | None:
    """Lines: the share of steps that accepted their k-th draft token."""
    best = [entry for entry in comparison.best() if entry.totals["acceptance_at"]]
    if not best:
        return None
    longest = max(len(entry.totals["acceptance_at"]) for entry in best)
    sheet = sheets.new(
        "Acceptance rate at each draft token",
        "Share of all steps that accepted at least k draft tokens, each method at its fastest budget",
        height=3.7,
        legend=[(entry.label, entry.method) for entry in best],
        lines=True,
    )
    (axes,) = sheet.axes
    for entry in best:
        rates = [100 * rate for rate in entry.totals["acceptance_at"]]
        axes.plot(range(1, len(rates) + 1), rates, **sheets.line(entry.method), clip_on=False)
    axes.set_xlim(0.8, longest + 0.2)
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(1, longest + 1))
    axes.set_xlabel("k (draft token)")
    axes.set_ylabel("acceptance rate (% of steps)")
    axes.grid(axis="y")
    return sheet.save("acceptance", "Acceptance rate at each k (unconditional).")


def draw_time(sheets: _Sheets, comparison: Comparison) -> Picture | None:
    """Stacked bars: where the time of a verification step goes."""
    best = [entry for entry in comparison.best()[::-1] if entry.totals["split"]["microseconds"]["step"]]
    if not best:
        return None
    phases = list(PHASE_COLOURS)
    sheet = sheets.new(
        "Where the time of a step goes",
        "Mean of all verification steps, prefill left out, each method at its fastest budget",
        height=0.95 + 0.46 * len(best),
        patches=list(PHASE_COLOURS.items()),
    )
    (axes,) = sheet.axes
    labels = [entry.label for entry in best]
    starts = [0.0] * len(best)
    for phase in phases:
        widths = [float(entry.totals["split"]["microseconds"].get(phase) or 0.0) for entry in best]
        axes.barh(labels, widths, 0.62, starts, color=PHASE_COLOURS[phase], edgecolor="white", linewidth=0.8)
        starts = [start + width for start, width in zip(starts, widths)]
    for i, end in enumerate(starts):
        _end_label(axes, end, i, f"{end:,.0f}")
    swatch = 0.011 * max(starts)  # the method's colour, left of its bar
    axes.barh(labels, swatch, 0.62, -1.7 * swatch, color=[sheets.colour(entry.method) for entry in best])
    axes.set_xlim(-1.9 * swatch, 1.1 * max(starts))
    axes.set_ylim(-0.62, len(best) - 0.38)
    axes.set_xlabel("microseconds per step")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return sheet.save("time", "Time of a verification step by phase, in microseconds.")


def draw_budgets(sheets: _Sheets, comparison: Comparison) -> Picture | None:
    """Lines: tau and speedup against the budget; None if no method has several."""
    methods = comparison.methods()
    if max(len(group) for group in methods.values()) < 2:
        return None
    sheet = sheets.new(
        "Speedup and tau against the budget",
        "Budget: draft tokens that the target scores in one pass",
        height=3.6,
        columns=2,
        legend=[(name, name) for name in methods],
        lines=True,
    )
    budgets = sorted({entry.budget for entry in comparison.entries})
    for axes, key, unit in zip(sheet.axes, ("speedup", "tau"), ("times plain decoding", "tokens per target pass")):
        for name, group in methods.items():
            values = [_value(entry.totals[key]) for entry in group]
            axes.plot([entry.budget for entry in group], values, **sheets.line(name))
        if budgets[-1] >= 4 * budgets[0]:
            axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.minorticks_off()
        axes.set_xlabel("budget (draft tokens)")
        axes.set_ylabel(f"{key} ({unit})")
        axes.margins(x=0.06, y=0.12)
        axes.grid(axis="y")
        if key == "speedup":
            _plain_line(axes)
    return sheet.save("budget", "Speedup and tau against the budget.")


def draw_training(sheets: _Sheets, trainings: Sequence[Training]) -> Picture | None:
    """Lines: loss, and tau or the expected accepted length on held-out text, against the training steps."""
    gain = ("tau", "tau (tokens per target pass)")
    if not any(training.curve("tau")[0] for training in trainings):
        gain = ("expected_accepted", "expected accepted length (draft tokens)")
    panels = {"loss (nat)": ("held_out", "loss"), gain[1]: (gain[0],)}
    shown = {label: keys for label, keys in panels.items() if any(t.curve(*keys)[0] for t in trainings)}
    if not shown:
        return None
    sheet = sheets.new(
        "Training curves",
        "On held-out text at each checkpoint; dotted: training loss. Losses compare only within one objective",
        height=3.6,
        columns=len(shown),
        legend=[(training.drafter, sheets.of_training(training)) for training in trainings],
        lines=True,
    )
    for axes, (label, keys) in zip(sheet.axes, shown.items()):
        for training in trainings:
            steps, values = training.curve(*keys)
            style = sheets.line(sheets.of_training(training))
            marked = list(range(len(steps) - 1, -1, -max(1, len(steps) // 8)))
            axes.plot(steps, values, **style, markevery=marked)
            if "loss" in keys and training.curve("held_out")[0] and len(trainings) <= 3:  # more would be a thicket
                axes.plot(*training.curve("loss"), color=style["color"], linewidth=1.2, linestyle=":", alpha=0.8)
        axes.set_xlabel("training steps")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_ylabel(label)
        axes.grid(axis="y")
    return sheet.save("training", "Training curves: held-out figures at each checkpoint.")


# ---------------------------------------------------------------- paper and ink


class _Sheets:
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
    ) -> _Sheet:
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
        return _Sheet(figure, list(axes), title, self._folder, self._format)


@dataclass
class _Sheet:
    figure: Any
    axes: list[Any]
    title: str
    folder: Path
    format: str

    def save(self, name: str, caption: str) -> Picture:
        """Write the figure through a temporary sibling and a rename."""
        path = self.folder / f"{name}.{self.format}"
        aside = self.folder / f".{path.name}.writing"
        try:
            self.figure.savefig(aside, format=self.format, metadata={"Date": None} if self.format == "svg" else None)
            os.replace(aside, path)
        finally:
            with suppress(OSError):
                aside.unlink()
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


def _plain_line(axes: Any, vertical: bool = False) -> None:
    """A dashed line at 1: plain decoding, in speedup as in tau."""
    draw = axes.axvline if vertical else axes.axhline
    draw(1.0, color="#4A4F57", linewidth=1.0, linestyle=(0, (4, 3)), zorder=3)
    where = {"xycoords": ("data", "axes fraction"), "xytext": (0, 3), "ha": "center"}
    if not vertical:
        where = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "va": "center"}
    axes.annotate("plain", (1.0, 1.0), textcoords="offset points", fontsize=8.5, color="#4A4F57", **where)


def _end_label(axes: Any, x: float, y: float, text: str) -> None:
    """A number at the end of a bar, on white, so that no line crosses it."""
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", bbox=white, zorder=4)


def _value(number: float | None) -> float:
    return 0.0 if number is None else float(number)


def _digits(value: float) -> str:
    return f"{value:.2f}" if value else "-"
