"""Does the forecast of forgetting, made on calibration data alone, foretell what the tests find forgotten?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from corda_vlm.report.analysis.results import Results
from corda_vlm.report.markup import shortened
from corda_vlm.report.plots.style import (
    FAINT,
    frame,
    literal_text,
    percent,
    plain_powers,
    save,
    styles,
)


@dataclass(frozen=True)
class Foretold:
    """Every unscaled trained model that carries a forecast.

    Attributes:
        methods: (n,) of each model.
        forecasts: (n,) the mean relative change of the layers' outputs on the knowledge.
        kept: (n,) the kept share.
    """

    methods: Sequence[str]
    forecasts: Float[np.ndarray, " n"]
    kept: Float[np.ndarray, " n"]

    @property
    def correlation(self) -> float:
        """Spearman's, of forecast and kept share: −1 if the forecast orders all models rightly."""
        return spearman(self.forecasts, self.kept)


def foretold(results: Results) -> Foretold:
    """The models with a forecast. Scaled ones are left out: their forecast follows from the unscaled one's."""
    found = [
        (method, results.forecasts[key], point.kept)
        for method in results.trained
        for setting, by_seed in results.points(method).items()
        for seed, point in by_seed.items()
        if setting.scale == 1.0
        and (key := (method, setting.learning_rate, seed)) in results.forecasts
    ]
    methods, forecasts, kept = zip(*found, strict=True) if found else ((), (), ())
    return Foretold(methods, np.array(forecasts, dtype=float), np.array(kept, dtype=float))


def spearman(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> float:
    """Rank correlation, ties at their mean rank; NaN for fewer than two values or where one side is constant."""
    if len(first) < 2:
        return float("nan")
    a, b = (_ranks(values) - (len(values) - 1) / 2 for values in (first, second))
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / size) if size > 0 else float("nan")


def _ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[places]


@literal_text()
def forecast_picture(results: Results, path: Path) -> Foretold | None:
    """Draw forecast against kept share, one mark a trained model. Gives what was drawn, None if there was nothing."""
    found = foretold(results)
    drawable = found.forecasts > 0  # nothing else has a place on a logarithmic axis
    if drawable.sum() < 2:
        return None
    methods = list(dict.fromkeys(found.methods))
    names: list[str] = []
    look = styles(list(results.trained))
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        of = drawable & np.array([name == method for name in found.methods])
        colour, marker = look[method]
        names.append(shortened(method))
        axes.plot(
            found.forecasts[of], found.kept[of], linestyle="", marker=marker, color=colour,
            markersize=6.5, markeredgecolor="white", markeredgewidth=0.6, alpha=0.9, label=str(len(names)),
        )  # fmt: skip
    axes.set_xscale("log")
    plain_powers(axes.xaxis)
    axes.yaxis.set_major_formatter(percent())
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
    return found
