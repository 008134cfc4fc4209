"""The picture of a comparison: what was kept of each task, and what was gained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.report.before_after.comparison import Comparison, number
from corda_vlm.report.before_after.pairs import Change
from corda_vlm.report.markup import shortened
from corda_vlm.report.plots.style import FAINT, INK, frame, literal_text, percent_axis, save, styles

_MOST_LINES = 60
_Value = Interval | float


@literal_text()
def change_picture(comparisons: Sequence[Comparison], path: Path) -> bool:
    """Draw the kept share of each retention task beside the gain of each gain task, a mark a model.

    Returns whether there was anything to draw.
    """
    kept = [
        one.task
        for one in comparisons[0].changes
        if one.role == "retention" and one.kept is not None
    ]
    gained = [one.task for one in comparisons[0].gained if one.before.is_share]
    panels = [tasks for tasks in (kept[:_MOST_LINES], gained[:_MOST_LINES]) if tasks]
    if not panels:
        return False
    lines = max(len(tasks) + (tasks is kept and len(kept) > 1) for tasks in panels)
    height = 1.5 + lines * max(0.34, 0.17 * len(comparisons)) + 0.2 * (len(comparisons) > 1)
    figure = Figure(figsize=(4.6 * len(panels) + 0.8, height), layout="constrained")
    axes = iter(figure.subplots(1, len(panels), squeeze=False)[0])
    if kept:
        _kept_panel(next(axes), comparisons, kept[:_MOST_LINES])
    if gained:
        _gain_panel(next(axes), comparisons, gained[:_MOST_LINES])
    if len(comparisons) > 1:
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    save(figure, path)
    return True


def _kept_panel(panel: Any, comparisons: Sequence[Comparison], tasks: Sequence[str]) -> None:
    rows = [*tasks, "mean"] if len(tasks) > 1 else list(tasks)
    values = [
        [*(_of(one, task).kept for task in tasks), one.kept][: len(rows)] for one in comparisons
    ]
    panel.axvline(1.0, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)))
    if len(tasks) > 1:
        panel.axhline(len(tasks) - 0.5, color="#d0d0d0", linewidth=0.8)
    _marks(panel, comparisons, rows, values)
    panel.xaxis.set_major_formatter(percent_axis())
    panel.set_title("Knowledge kept", fontsize=10.5, loc="left", color=INK)


def _gain_panel(panel: Any, comparisons: Sequence[Comparison], tasks: Sequence[str]) -> None:
    panel.axvline(0.0, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)))
    values = [[_of(one, task).gain for task in tasks] for one in comparisons]
    _marks(panel, comparisons, tasks, values)
    panel.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{100 * v:+.5g}".replace("-", "−") if v else "0")
    )
    panel.set_title("Gain on what was learned, in points", fontsize=10.5, loc="left", color=INK)


def _of(comparison: Comparison, task: str) -> Change:
    return next(one for one in comparison.changes if one.task == task)


def _marks(
    panel: Any,
    comparisons: Sequence[Comparison],
    rows: Sequence[str],
    values: Sequence[Sequence[_Value | None]],
) -> None:
    """A line a task, and in it the models one below the other."""
    frame(panel)
    looks = styles([one.name for one in comparisons])
    apart = 0.6 * ((np.arange(len(comparisons)) + 0.5) / len(comparisons) - 0.5)
    for k, (comparison, of) in enumerate(zip(comparisons, values, strict=True)):
        color, marker = looks[comparison.name]
        drawn = [(place, value) for place, value in enumerate(of) if value is not None]
        heights = np.array([place + apart[k] for place, _ in drawn])
        middles = [number(value) for _, value in drawn]
        for height, (_, value) in zip(heights, drawn, strict=True):
            if isinstance(value, Interval):
                panel.plot([value.low, value.high], [height, height], color=color, linewidth=1.6)
        label = shortened(comparison.name, 28)
        panel.plot(middles, heights, marker, color=color, markersize=6, label=label)
    panel.set_yticks(range(len(rows)), [shortened(row, 30) for row in rows])
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.grid(axis="y", visible=False)
