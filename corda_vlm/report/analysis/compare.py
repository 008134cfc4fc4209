"""Curves against each other, with intervals: at one accuracy, along a range, and by single models chosen on validation.

All intervals are 95 % bootstrap intervals over seeds: they cover the luck of training. The luck of which test examples
there are, which all models of a run share, is not in them; the base model's own intervals show how large it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Interval
from corda_vlm.report.analysis.results import (
    REFERENCE,
    Curve,
    Point,
    Results,
    Setting,
    heights,
    mean_height,
    mean_point,
)

MARGIN = 0.05
"""Frontiers are compared from this much above the base model's task accuracy: before it nothing was learnt."""


@dataclass(frozen=True)
class Comparison:
    """One curve where it has learnt as much as the reference, with 95 % intervals from a bootstrap over seeds.

    Attributes:
        curve: the method, or "method, scaled".
        share: task accuracy as a share of the reference's best; None for the area under the frontier.
        task: that task accuracy.
        kept: what is kept there; None where the curve does not reach it (in the means over seeds).
        ratio: kept over what the reference keeps; None where either is missing or the reference kept nothing.
        reached: share of the resamples in which the curve reaches the accuracy.
    """

    curve: str
    share: float | None
    task: float
    kept: Interval | None
    ratio: Interval | None
    reached: float


@dataclass(frozen=True)
class Dominance:
    """How far one curve lies above another, on a range of task accuracies.

    Attributes:
        curve, reference: their labels, as in `Results.curves`.
        start, stop: the range.
        mean: of the difference of what both keep along it; a curve that does not reach an accuracy keeps 0 there.
        minimum: the smallest difference on the range.
        where: the task accuracy at which it is, in the means over seeds.
        above: share of the range on which the curve lies above, in the means over seeds.
    """

    curve: str
    reference: str
    start: float
    stop: float
    mean: Interval
    minimum: Interval
    where: float
    above: float

    @property
    def everywhere(self) -> bool:
        """Does the curve lie above on the whole range, with 95 % confidence?"""
        return self.minimum.low > 0.0


@dataclass(frozen=True)
class Choice:
    """The one model of a curve that stands for it where a single number is claimed.

    Attributes:
        curve: its label.
        setting: learning rate and scale, chosen on the selection tasks; None where none learns enough there.
        forecast: whether the forecast of forgetting decided among those that learn enough.
        task: its accuracy on the gain tasks.
        share: the same as a share of the reference's at its best.
        kept: chance subtracted, the mean over the retention tasks.
        raw: task -> its score as a share of the base model's, chance not subtracted.
    """

    curve: str
    setting: Setting | None
    forecast: bool = False
    task: Interval | None = None
    share: Interval | None = None
    kept: Interval | None = None
    raw: Mapping[str, Interval] | None = None


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
        found, _ = self.interval(values)
        assert found is not None
        return found


def drawn_of(by_seed: Mapping[int | None, Point], drawn: Sequence[int | None]) -> list[Point]:
    """The points of the drawn seeds; a method that lacks them (still running) is judged by those it has."""
    return [by_seed[s] for s in drawn if s in by_seed] or list(by_seed.values())


def compare(
    results: Results,
    shares: Sequence[float] = (1.0, 0.95),
    reference: str = REFERENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """Every curve at the task accuracy of the reference's best learning rate and at shares of it, and the
    area under it from `MARGIN` above the base model's task accuracy to the reference's best.

    The accuracy aimed at is the reference's in the same resample: its own luck is part of the interval.
    Empty if the reference was not trained.
    """
    best, base = results.best_setting(reference), results.base_point
    if best is None or base is None:
        return []
    seeds = SeedBootstrap(results, resamples, seed)
    aim = seeds.means.points[reference][best].task
    start = base.task + MARGIN

    def measure(draw: Draw, label: str, share: float | None) -> float:
        stop = draw.points[reference][best].task
        if share is not None:
            return float(draw.curves[label].at(np.array([share * stop]))[0])
        return mean_height(heights(draw.curves[label], start, stop)) if stop > start else np.nan

    found = []
    for share in (*shares, None):
        of_reference = seeds.over(lambda d, s=share: measure(d, reference, s))
        of_reference[~(of_reference > 0)] = np.nan
        for label in results.curves():
            values = seeds.over(lambda d, c=label, s=share: measure(d, c, s))
            kept, reached = seeds.interval(values)
            ratio, _ = seeds.interval(values / of_reference)
            found.append(Comparison(label, share, aim * (share or 1.0), kept, ratio, reached))
    return found


def dominates(
    results: Results,
    curve: str,
    reference_curve: str,
    start: float | None = None,
    stop: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Dominance:
    """How far `curve` lies above `reference_curve`, in the same resampled seeds.

    Args:
        curve, reference_curve: labels, as in `Results.curves`.
        start: task accuracy; None: `MARGIN` above the base model's.
        stop: task accuracy; None: what the reference method reaches at its best learning rate, in the same resample.

    Raises:
        UnknownNameError: no such curve.
        CordaError: an empty range, or nothing to compare by.
    """
    return against(results, reference_curve, [curve], start, stop, resamples, seed)[0]


def against(
    results: Results,
    reference_curve: str,
    curves: Sequence[str] | None = None,
    start: float | None = None,
    stop: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Dominance]:
    """`dominates` for several curves, all others by default."""
    labels = results.curves()
    others = [label for label in labels if label != reference_curve] if curves is None else curves
    for label in (reference_curve, *others):
        if label not in labels:
            raise UnknownNameError("curve", label, labels)
    base, best = results.base_point, results.best_setting(REFERENCE)
    if base is None or (stop is None and best is None):
        raise CordaError(
            f"frontiers are compared up to the task accuracy of {REFERENCE}; train it, or give start and stop"
        )
    seeds = SeedBootstrap(results, resamples, seed)
    begin = base.task + MARGIN if start is None else start

    def end(draw: Draw) -> float:
        if stop is not None:
            return stop
        assert best is not None
        return draw.points[REFERENCE][best].task

    last = end(seeds.means)
    if not begin < last:
        raise CordaError(f"no range of task accuracies from {begin:.3f} to {last:.3f}")

    def difference(draw: Draw, label: str) -> np.ndarray:
        below = heights(draw.curves[reference_curve], begin, end(draw))
        return heights(draw.curves[label], begin, end(draw)) - below

    found = []
    for label in others:
        mean = seeds.over(lambda d, c=label: mean_height(difference(d, c)))
        least = seeds.over(lambda d, c=label: float(difference(d, c).min()))
        overall = difference(seeds.means, label)
        found.append(
            Dominance(
                label, reference_curve, begin, last,
                mean=seeds.certain(mean),
                minimum=seeds.certain(least),
                where=float(np.linspace(begin, last, len(overall))[overall.argmin()]),
                above=float((overall > 0).mean()),
            )
        )  # fmt: skip
    return found


def choose(
    results: Results,
    share: float = 0.95,
    reference: str = REFERENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Choice]:
    """For each curve the one model that stands for it, chosen without looking at any test split.

    Of the settings that learn at least `share` of what the reference's best does, on the selection tasks, it is the one
    with the smallest forecast of forgetting, where all of them carry one, and otherwise the one that just learns enough.
    """
    best = results.best_setting(reference)
    if best is None or results.base_point is None:
        return []
    target = share * results.judged(reference)[best]
    seeds = SeedBootstrap(results, resamples, seed)

    def interval(statistic: Callable[[Draw], float]) -> Interval:
        return seeds.certain(seeds.over(statistic))

    found = []
    for label, (method, scaled) in results.curves().items():
        enough = {
            s: value
            for s, value in results.judged(method).items()
            if value >= target and (scaled or s.scale == 1.0)
        }
        if not enough:
            found.append(Choice(label, None))
            continue
        forecasts = {s: results.forecast(method, s) for s in enough}
        foretold = None not in forecasts.values()
        order = forecasts if foretold else enough
        chosen = min(enough, key=lambda s: order[s] or 0.0)

        def at(draw: Draw, m: str = method, s: Setting = chosen) -> Point:
            return draw.points[m][s]

        raw = {}
        for task in results.known:
            shares = {
                seed: Point(0.0, scores[task] / results.base[task])
                for seed, scores in results.trained[method][chosen].items()
                if task in scores
            }
            raw[task] = interval(lambda d, by=shares: mean_point(drawn_of(by, d.seeds)).kept)
        found.append(
            Choice(
                label, chosen, foretold,
                task=interval(lambda d, a=at: a(d).task),
                share=interval(lambda d, a=at: a(d).task / d.points[reference][best].task),
                kept=interval(lambda d, a=at: a(d).kept),
                raw=raw,
            )
        )  # fmt: skip
    return found
