"""What foretells forgetting: which number, taken without any test of the knowledge, ranks models as the tests then do?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float

from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.report.analysis.results import PREDICTORS, Results

_RESAMPLES = 1000

_ENOUGH = 3
"""Models of which an order says something."""


@dataclass(frozen=True)
class Forecasts:
    """Every unscaled trained model that carries a predictor of forgetting.

    Attributes:
        predictor: which of `PREDICTORS`.
        methods: (n,) of each model.
        forecasts: (n,) its value: of "forecast" the mean relative change of the layers' outputs on the knowledge.
        kept: (n,) the kept share.
    """

    predictor: str
    methods: Sequence[str]
    forecasts: Float[np.ndarray, " n"]
    kept: Float[np.ndarray, " n"]

    @property
    def correlation(self) -> float:
        """Spearman's, of forecast and kept share: −1 if the forecast orders all models rightly."""
        return spearman(self.forecasts, self.kept)


@dataclass(frozen=True)
class Ranking:
    """How well each predictor puts some models in the order of what they kept.

    Attributes:
        of: the method, None for all models of all methods.
        count: of models.
        spearman, kendall: predictor -> rank correlation with the kept share, −1 for the right order.
        behind: predictor -> by how much its Spearman's correlation is above that of the best, with its paired interval over
            models; none of the best itself.
    """

    of: str | None
    count: int
    spearman: Mapping[str, float]
    kendall: Mapping[str, float]
    behind: Mapping[str, Interval] = field(default_factory=dict)


def forecasts_of(results: Results, predictor: str = PREDICTORS[0]) -> Forecasts:
    """The models with a predictor. Scaled ones are left out: their forecast follows from the unscaled one's."""
    noted = results.predictors.get(predictor, {})
    rows = [
        (method, noted[key], point.kept)
        for method in results.trained
        for setting, by_seed in results.points(method).items()
        for seed, point in by_seed.items()
        if setting.scale == 1.0 and (key := (method, setting.learning_rate, seed)) in noted
    ]
    methods, forecasts, kept = zip(*rows, strict=True) if rows else ((), (), ())
    return Forecasts(
        predictor, methods, np.array(forecasts, dtype=float), np.array(kept, dtype=float)
    )


def predictors_of(results: Results) -> list[Forecasts]:
    """Of each predictor that is noted its models."""
    every = [forecasts_of(results, name) for name in PREDICTORS]
    return [one for one in every if len(one.kept)]


def rankings(results: Results) -> list[Ranking]:
    """Over all models, and within each method that has a few, of the models that carry every predictor that any carries.

    None where fewer than two predictors are noted, or no model carries all that are: there is nothing to compare.
    """
    noted = {name: values for name, values in results.predictors.items() if values}
    if len(noted) < 2:
        return []
    common = set.intersection(*map(set, noted.values()))
    shared = {n: {k: v for k, v in values.items() if k in common} for n, values in noted.items()}
    if not (every := predictors_of(replace(results, predictors=shared))):
        return []  # each model carries another one
    methods = dict.fromkeys(every[0].methods)
    found = [_ranking(of, every) for of in (None, *methods)]
    return [ranking for ranking in found if ranking.count >= _ENOUGH]


def _ranking(of: str | None, every: Sequence[Forecasts]) -> Ranking:
    """Of the models of one method, or of all."""
    chosen = np.array([of in (None, method) for method in every[0].methods], dtype=bool)
    values = {one.predictor: (one.forecasts[chosen], one.kept[chosen]) for one in every}
    correlations = {name: spearman(*both) for name, both in values.items()}
    return Ranking(
        of,
        int(chosen.sum()),
        correlations,
        {name: kendall(*both) for name, both in values.items()},
        _behind(values, correlations) if of is None else {},
    )


def _behind(
    values: Mapping[str, tuple[np.ndarray, np.ndarray]], correlations: Mapping[str, float]
) -> dict[str, Interval]:
    """How far each predictor is behind the best, over resamples of the models that all of them share."""
    told = {name: value for name, value in correlations.items() if not np.isnan(value)}
    if len(told) < 2:
        return {}
    best = min(told, key=lambda name: told[name])
    count = len(values[best][0])
    drawn = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    resampled = {
        name: np.array([spearman(values[name][0][d], values[name][1][d]) for d in drawn])
        for name in told
    }
    found = {}
    for name in told:
        if name != best:
            low, high = np.nanquantile(resampled[name] - resampled[best], [0.025, 0.975])
            found[name] = Interval(told[name] - told[best], float(low), float(high))
    return found


def spearman(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> float:
    """Rank correlation, ties at their mean rank; NaN for fewer than two values or where one side is constant."""
    if len(first) < 2:
        return float("nan")
    return _cosine(*(_ranks(values) - (len(values) - 1) / 2 for values in (first, second)))


def kendall(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> float:
    """Kendall's τ_b: of all pairs the share in one order less that in opposite orders; ties are taken into account. NaN as
    for `spearman`."""
    return _cosine(*(np.sign(v[:, None] - v[None, :]).ravel() for v in (first, second)))


def _cosine(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / size) if size > 0 else float("nan")


def _ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[places]
