"""The picture of what may foretell forgetting against what the tests find forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from corda_vlm.report.analysis.forecast import Forecasts, predictors_of
from corda_vlm.report.analysis.results import Results
from corda_vlm.report.markup import shortened
from corda_vlm.report.plots.style import (
    FAINT,
    INK,
    frame,
    literal_text,
    percent_axis,
    plain_powers,
    save,
    styles,
)

AXES = {
    "forecast": "forecast: change of the layers'\noutputs on the calibration data",
    "kl_new": "KL to the base on the new task,\nin nats",
    "update_size": "size of the update,\nrelative to the weights",
    "task_change": "change of the layers' outputs\non the new task",
}


_DECADES = 10.0


@literal_text()
def forecast_picture(results: Results, path: Path) -> list[Forecasts]:
    """Draw each predictor that is noted against the kept share, in a panel of its own, one mark a trained model.

    Gives what was drawn; nothing is where there are no two models to draw.
    """
    drawn = [one for one in predictors_of(results) if _drawable(one).sum() >= 2]
    if not drawn:
        return []
    methods = list(dict.fromkeys(method for one in drawn for method in one.methods))
    look = styles(list(results.trained))
    columns = len(drawn) if len(drawn) < 4 else 2
    rows = -(-len(drawn) // columns)
    figure = Figure(
        figsize=(4.6 + 4.0 * (columns - 1) if columns > 1 else 8.6, 0.4 + 4.4 * rows),
        layout="constrained",
    )
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel, one in zip(panels, drawn, strict=False):
        _panel(panel, one, look)
        if len(drawn) > 1:
            panel.set_title(
                f"rank correlation {one.correlation:.2f}".replace("-", "−"),
                fontsize=10,
                loc="left",
                color=INK,
            )
    for panel in panels[::columns]:
        panel.set_ylabel("knowledge kept, as tested")
    for panel in panels[len(drawn) :]:
        panel.set_visible(False)
    _legend(figure, panels[columns - 1], methods, look)
    save(figure, path)
    return drawn


def _drawable(one: Forecasts) -> np.ndarray:
    return one.forecasts > 0  # nothing else has a place on a logarithmic axis


def _panel(axes: Any, one: Forecasts, look: Mapping[str, tuple[str, str]]) -> None:
    for method in dict.fromkeys(one.methods):
        of = _drawable(one) & np.array([name == method for name in one.methods])
        color, marker = look[method]
        axes.plot(
            one.forecasts[of], one.kept[of], linestyle="", marker=marker, color=color, markersize=6.5,
            markeredgecolor="white", markeredgewidth=0.6, alpha=0.9,
        )  # fmt: skip
    axes.set_xscale("log")
    plain_powers(axes.xaxis)
    low, high = axes.get_xlim()
    if high > _DECADES * low:  # a panel has no room for more than the powers of ten
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(percent_axis())
    axes.axhline(0.0, color=FAINT, linewidth=1, linestyle=":")
    axes.set_xlabel(AXES[one.predictor])
    frame(axes)


def _legend(
    figure: Figure, beside: Any, methods: Sequence[str], look: Mapping[str, tuple[str, str]]
) -> None:
    marks = []
    for method in methods:
        color, marker = look[method]
        marks.append(
            beside.plot([], [], linestyle="", marker=marker, color=color, markersize=6.5)[0]
        )
    # not as labels of what is drawn: one that begins with "_" would be left out
    legend = beside.legend(
        marks, [str(n) for n, _ in enumerate(methods)], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
        fontsize=8.5, handletextpad=0.3,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), methods, strict=True):
        text.set_text(shortened(name))
