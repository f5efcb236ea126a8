"""Figures of a comparison. One colour and marker per method, the same in every figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .compare import Comparison, Training
from .sheets import INK, PHASE_COLOURS, STYLE, WIDTH, Picture, Sheets, digits, end_label, plain_line, value_of

MANY = 20
"""Steps from which on their mean is drawn."""


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
        sheets = Sheets(comparison, trainings, folder, format)
        drawn = [
            draw_speedup(sheets, comparison),
            draw_categories(sheets, comparison),
            draw_acceptance(sheets, comparison),
            draw_time(sheets, comparison),
            draw_budgets(sheets, comparison),
            draw_calibration(sheets, comparison),
            draw_training(sheets, trainings),
        ]
    return [picture for picture in drawn if picture is not None]


def draw_speedup(sheets: Sheets, comparison: Comparison) -> Picture:
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
        values = [value_of(entry.totals[key]) for entry in best]
        axes.barh([entry.label for entry in best], values, height=0.62, color=[sheets.colour(e.method) for e in best])
        plain_line(axes, vertical=True)
        for i, value in enumerate(values):
            end_label(axes, value, i, digits(value))
        axes.set_xlim(0, 1.13 * max(1.0, *values))
        axes.set_ylim(-0.62, len(best) - 0.38)
        axes.set_xlabel(f"{key} ({unit})")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    return sheet.save("speedup", "Speedup over plain decoding and tau, at each method's fastest budget.")


def draw_categories(sheets: Sheets, comparison: Comparison) -> Picture | None:
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
        heights = [value_of(group.get("tau")) for group in groups]
        xs = [place + (i - (len(best) - 1) / 2) * bar for place in places]
        axes.bar(xs, heights, 0.88 * bar, color=sheets.colour(entry.method))
        if len(best) * len(places) <= 24:
            for x, height in zip(xs, heights):
                axes.annotate(
                    digits(height), (x, height), (0, 3), textcoords="offset points", ha="center", fontsize=8.5
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
    plain_line(axes)
    return sheet.save("categories", "Tau per category, at each method's fastest budget.")


def draw_acceptance(sheets: Sheets, comparison: Comparison) -> Picture | None:
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


def draw_time(sheets: Sheets, comparison: Comparison) -> Picture | None:
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
        end_label(axes, end, i, f"{end:,.0f}")
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


def draw_budgets(sheets: Sheets, comparison: Comparison) -> Picture | None:
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
            values = [value_of(entry.totals[key]) for entry in group]
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
            plain_line(axes)
    return sheet.save("budget", "Speedup and tau against the budget.")


def draw_calibration(sheets: Sheets, comparison: Comparison) -> Picture | None:
    """Lines: accepted length against the one that the drafter expected, by whole tokens."""
    known = []
    for entry in comparison.best():
        every = (entry.totals.get("calibration") or {"bins": []})["bins"]
        if pairs := [pair for steps, *pair in every if steps >= MANY]:
            known.append((entry, pairs))
    if not known:
        return None
    sheet = sheets.new(
        "What drafters expect, and what is accepted",
        f"Mean of the steps that expect so much, if they are {MANY} or more, each method at its fastest budget",
        height=3.9,
        legend=[(entry.label, entry.method) for entry, _ in known],
        lines=True,
    )
    (axes,) = sheet.axes
    longest = max(value for _, pairs in known for pair in pairs for value in pair)
    for entry, pairs in known:
        axes.plot(*zip(*pairs), **sheets.line(entry.method), clip_on=False)
    axes.plot([0, longest], [0, longest], color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlabel("expected (draft tokens)")
    axes.set_ylabel("accepted (draft tokens)")
    axes.grid(axis="both")
    return sheet.save("calibration", "Accepted length against the expected one; on the dashed line they agree.")


def draw_training(sheets: Sheets, trainings: Sequence[Training]) -> Picture | None:
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
