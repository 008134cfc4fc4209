"""Does the forecast of forgetting, made on calibration data alone, predict what the tests find forgotten?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from corda_vlm.report.analysis.results import Results


@dataclass(frozen=True)
class Forecasts:
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


def forecasts_of(results: Results) -> Forecasts:
    """The models with a forecast. Scaled ones are left out: their forecast follows from the unscaled one's."""
    rows = [
        (method, results.forecasts[key], point.kept)
        for method in results.trained
        for setting, by_seed in results.points(method).items()
        for seed, point in by_seed.items()
        if setting.scale == 1.0
        and (key := (method, setting.learning_rate, seed)) in results.forecasts
    ]
    methods, forecasts, kept = zip(*rows, strict=True) if rows else ((), (), ())
    return Forecasts(methods, np.array(forecasts, dtype=float), np.array(kept, dtype=float))


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
