"""The picture of the forecast of forgetting against what the tests find forgotten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from corda_vlm.report.analysis.forecast import Forecasts, forecasts_of
from corda_vlm.report.analysis.results import Results
from corda_vlm.report.markup import shortened
from corda_vlm.report.plots.style import (
    FAINT,
    frame,
    literal_text,
    percent_axis,
    plain_powers,
    save,
    styles,
)


@literal_text()
def forecast_picture(results: Results, path: Path) -> Forecasts | None:
    """Draw forecast against kept share, one mark a trained model. Gives what was drawn, None if there was nothing."""
    forecasts = forecasts_of(results)
    drawable = forecasts.forecasts > 0  # nothing else has a place on a logarithmic axis
    if drawable.sum() < 2:
        return None
    methods = list(dict.fromkeys(forecasts.methods))
    names: list[str] = []
    look = styles(list(results.trained))
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        of = drawable & np.array([name == method for name in forecasts.methods])
        color, marker = look[method]
        names.append(shortened(method))
        axes.plot(
            forecasts.forecasts[of], forecasts.kept[of], linestyle="", marker=marker, color=color,
            markersize=6.5, markeredgecolor="white", markeredgewidth=0.6, alpha=0.9, label=str(len(names)),
        )  # fmt: skip
    axes.set_xscale("log")
    plain_powers(axes.xaxis)
    axes.yaxis.set_major_formatter(percent_axis())
    axes.axhline(0.0, color=FAINT, linewidth=1, linestyle=":")
    axes.set_xlabel("forecast: relative change of the layers' outputs on the calibration data")
    axes.set_ylabel("knowledge kept, as tested")
    frame(axes)
    legend = axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5, handletextpad=0.3
    )
    # not as labels of what is drawn: one that begins with "_" would be left out
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
    save(figure, path)
    return forecasts
