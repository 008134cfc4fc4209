"""A bootstrap over seeds: the curves of a run, and the same curves over resampled seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from corda_vlm.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Interval
from corda_vlm.report.analysis.curve import Curve, Point, Setting, mean_point
from corda_vlm.report.analysis.results import Results


@dataclass(frozen=True)
class Draw:
    """The means over some seeds, drawn with replacement.

    Attributes:
        seeds: which.
        points: method -> setting -> mean point.
        curves: label -> curve.
    """

    seeds: Sequence[int | None]
    points: Mapping[str, Mapping[Setting, Point]]
    curves: Mapping[str, Curve]


class SeedBootstrap:
    """The curves of a run, and the same curves over resampled seeds.

    The seeds are resampled together for all methods, so that luck which they share cancels; few seeds have few
    distinct resamples, each of which is computed once.
    """

    def __init__(self, results: Results, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self._results = results
        seeds = results.seeds
        generator = np.random.default_rng(seed)
        draws = np.sort(generator.integers(0, len(seeds), size=(resamples, len(seeds))), axis=1)
        distinct, self._counts = np.unique(draws, axis=0, return_counts=True)
        self.means = self._over(seeds)
        self._resampled = [self._over([seeds[i] for i in draw]) for draw in distinct]

    def _over(self, drawn: Sequence[int | None]) -> Draw:
        results, points, curves = self._results, {}, {}
        for method in results.trained:
            points[method] = {
                setting: mean_point(drawn_of(by_seed, drawn))
                for setting, by_seed in results.points(method).items()
            }
        for label, (method, scaled) in results.curves().items():
            of = {s: p for s, p in points[method].items() if scaled or s.scale == 1.0}
            curves[label] = Curve(of, results.base_point if scaled else None)
        return Draw(drawn, points, curves)

    def over(self, statistic: Callable[[Draw], float]) -> Float[np.ndarray, " draws"]:
        """`statistic` of the means, and then of each distinct resample; NaN where it does not exist."""
        return np.array([statistic(draw) for draw in (self.means, *self._resampled)])

    def interval(self, values: Float[np.ndarray, " draws"]) -> tuple[Interval | None, float]:
        """What `over` gave as a value with its interval, and the share of the resamples in which it exists."""
        value, drawn = float(values[0]), np.repeat(values[1:], self._counts)
        usable = drawn[~np.isnan(drawn)]
        reached = len(usable) / len(drawn)
        if np.isnan(value) or not len(usable):
            return None, reached
        tail = 50.0 * (1.0 - CONFIDENCE)
        low, high = np.percentile(usable, [tail, 100.0 - tail])
        return Interval(value, float(low), float(high)), reached

    def certain(self, values: Float[np.ndarray, " draws"]) -> Interval:
        """The interval of a statistic that exists in every resample."""
        interval, _ = self.interval(values)
        assert interval is not None
        return interval


def drawn_of(by_seed: Mapping[int | None, Point], drawn: Sequence[int | None]) -> list[Point]:
    """The points of the drawn seeds; a method that lacks them (still running) is judged by those it has."""
    return [by_seed[s] for s in drawn if s in by_seed] or list(by_seed.values())
