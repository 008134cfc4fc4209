"""The pictures of training: loss over steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from corda_vlm.evaluation.convergence import read_histories
from corda_vlm.evaluation.drawing import INK, frame, save


def training_curves(run_dir: Path, path: Path) -> bool:
    """Draw the training loss of every run that left a history.jsonl, a panel for each method.

    Histories lie in `run_dir/<method>/<learning rate>-<seed>/history.jsonl`, rows with `step` and `loss`.
    Returns whether there was anything to draw.
    """
    histories = read_histories(run_dir)
    if not histories:
        return False
    columns = min(3, len(histories))
    lines = -(-len(histories) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.6, 2.6 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(histories) :]:
        panel.set_visible(False)
    top = []
    for panel, (method, runs) in zip(panels.flat, histories.items(), strict=False):
        rates = sorted({run.learning_rate for run in runs})
        shades = colormaps["viridis"](np.linspace(0.1, 0.8, len(rates)))
        named = set()
        for run in sorted(runs, key=lambda run: run.learning_rate):
            rate, smooth = run.learning_rate, _smooth(run.losses)
            top += [float(v) for v in smooth if np.isfinite(v)]
            panel.plot(
                run.steps, smooth, color=shades[rates.index(rate)], linewidth=1.2,
                label=f"{rate:g}" if rate not in named else None,
            )  # fmt: skip
            named.add(rate)
        panel.set_title(method, fontsize=10.5, loc="left", color=INK)
        panel.legend(title="learning rate", fontsize=7.5, title_fontsize=7.5, frameon=False)
        frame(panel)
    if top:  # a run that diverged must not flatten all the others
        panels[0, 0].set_ylim(0, float(np.percentile(top, 99)) * 1.1)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    for panel in panels[:, 0]:
        panel.set_ylabel("training loss")
    save(figure, path)
    return True


def _smooth(losses: Sequence[float]) -> np.ndarray:
    """A running mean over a twentieth of the run, shorter at both ends."""
    half = max(0, len(losses) // 40)
    values = np.asarray(losses, dtype=float)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
