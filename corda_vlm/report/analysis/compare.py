"""Curves against each other, with intervals: at one accuracy, and along a range.

All intervals are 95 % bootstrap intervals over seeds: they cover the luck of training. The luck of which test examples
there are, which all models of a run share, is not in them; the base model's own intervals show how large it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation.bootstrap import RESAMPLES, Interval
from corda_vlm.report.analysis.curve import heights, mean_height
from corda_vlm.report.analysis.results import REFERENCE, Results
from corda_vlm.report.analysis.seeds import Draw, SeedBootstrap

MARGIN = 0.05
"""Frontiers are compared from this much above the base model's task accuracy: before it nothing was learned."""


@dataclass(frozen=True)
class Comparison:
    """One curve where it has learned as much as the reference, with 95 % intervals from a bootstrap over seeds.

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

    comparisons = []
    for share in (*shares, None):
        of_reference = seeds.over(lambda d, s=share: measure(d, reference, s))
        of_reference[~(of_reference > 0)] = np.nan
        for label in results.curves():
            values = seeds.over(lambda d, c=label, s=share: measure(d, c, s))
            kept, reached = seeds.interval(values)
            ratio, _ = seeds.interval(values / of_reference)
            comparisons.append(Comparison(label, share, aim * (share or 1.0), kept, ratio, reached))
    return comparisons


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

    dominances = []
    for label in others:
        mean = seeds.over(lambda d, c=label: mean_height(difference(d, c)))
        least = seeds.over(lambda d, c=label: float(difference(d, c).min()))
        overall = difference(seeds.means, label)
        dominances.append(
            Dominance(
                label, reference_curve, begin, last,
                mean=seeds.certain(mean),
                minimum=seeds.certain(least),
                where=float(np.linspace(begin, last, len(overall))[overall.argmin()]),
                above=float((overall > 0).mean()),
            )
        )  # fmt: skip
    return dominances
