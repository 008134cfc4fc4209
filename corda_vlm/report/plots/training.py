"""The pictures of training: loss, and the forecast of forgetting, over steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from corda_vlm.report.analysis.convergence import History, read_histories
from corda_vlm.report.markup import shortened
from corda_vlm.report.plots.style import FAINT, INK, frame, literal_text, plain_powers, save


@literal_text()
def training_curves(run_dir: Path, path: Path) -> bool:
    """Draw the training loss of every run that left a history.jsonl, a panel for each method; where histories have the
    anchor, below it the forecast of forgetting.

    Histories lie in `run_dir/<method>/<learning rate>-<seed>/history.jsonl`, rows with `step`, `loss` and perhaps
    `anchor`. Returns whether there was anything to draw.
    """
    histories = read_histories(run_dir)
    if not histories:
        return False
    columns = min(3, len(histories))
    lines = -(-len(histories) // columns)
    forecast = any(_anchors(run) for runs in histories.values() for run in runs)
    rows = lines * (2 if forecast else 1)
    figure = Figure(figsize=(3.2 * columns + 0.6, 2.6 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    for panel in panels.flat:
        panel.set_visible(False)
    above = panels[:: 2 if forecast else 1]
    for panel, (method, runs) in zip(above.flat, histories.items(), strict=False):
        _curves(panel, [(run.learning_rate, run.steps, _smooth(run.losses)) for run in runs])
        panel.set_title(shortened(method, 28), fontsize=10.5, loc="left", color=INK)
        panel.legend(title="learning rate", fontsize=7.5, title_fontsize=7.5, frameon=False)
    _share_scale(above, "training loss", from_zero=True)
    if forecast:
        below = panels[1::2]
        for panel, runs in zip(below.flat, histories.values(), strict=False):
            noted = [(run.learning_rate, anchors) for run in runs if (anchors := _anchors(run))]
            _curves(panel, [(rate, steps, values) for rate, (steps, values) in noted])
        _share_scale(below, "change of outputs\non the knowledge", from_zero=False)
        title = "lower row: forecast of forgetting, the mean relative change of layers' outputs on the knowledge"
        figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, color=FAINT)
    for column in panels.T:
        shown = [panel for panel in column if panel.get_visible()]
        shown[-1].set_xlabel("step")
        shown[-1].tick_params(labelbottom=True)
    save(figure, path)
    return True


def _curves(
    panel: Any, runs: Sequence[tuple[float, Sequence[int], Sequence[float] | np.ndarray]]
) -> None:
    """One line a run, the runs of a learning rate in one shade."""
    rates = sorted({rate for rate, _, _ in runs})
    shades = colormaps["viridis"](np.linspace(0.1, 0.8, max(1, len(rates))))
    named = set()
    for rate, steps, values in sorted(runs, key=lambda run: run[0]):
        label = f"{rate:g}" if rate not in named else None
        panel.plot(steps, values, color=shades[rates.index(rate)], linewidth=1.2, label=label)
        named.add(rate)
    panel.set_visible(True)
    frame(panel)


def _share_scale(panels: np.ndarray, label: str, *, from_zero: bool) -> None:
    """One scale for a kind of panel, over all its lines; logarithmic where it spans decades, if it need not be zero."""
    drawn = [panel for panel in panels.flat if panel.get_visible()]
    lines = [np.asarray(line.get_ydata(), dtype=float) for p in drawn for line in p.get_lines()]
    values = np.concatenate([np.empty(0), *lines])
    values = values[np.isfinite(values)]
    if not from_zero:
        values = values[values > 0]
    for panel in panels[:, 0]:
        panel.set_ylabel(label)
    if not len(values):
        return
    low, high = float(values.min()), float(np.percentile(values, 99))
    for panel in drawn:
        if not from_zero and high > 100 * low:
            panel.set_yscale("log")
            plain_powers(panel.yaxis)
            panel.set_ylim(max(low / 2, high * 1e-6), high * 2)
        else:  # a run that diverged must not flatten all the others
            panel.set_ylim(0, high * 1.1)


def _anchors(run: History) -> tuple[list[int], list[float]] | None:
    """Steps and values of the anchor, where a run noted it."""
    logged = [(int(e["step"]), float(e["anchor"])) for e in run.entries if "anchor" in e]
    return ([step for step, _ in logged], [value for _, value in logged]) if logged else None


def _smooth(losses: Sequence[float]) -> np.ndarray:
    """A running mean over a twentieth of the run, shorter at both ends."""
    half = max(0, len(losses) // 40)
    values = np.asarray(losses, dtype=float)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
