"""Who keeps most where all have learned equally much, and whether that is more than the luck of the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from corda_vlm.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Interval
from corda_vlm.report.analysis.results import REFERENCE, Results
from corda_vlm.report.analysis.seeds import Draw, SeedBootstrap


@dataclass(frozen=True)
class Standing:
    """The curves of all methods but the reference's, at a share of the reference's best task accuracy.

    Attributes:
        share: of the reference's best; 1 is the best itself.
        task: that task accuracy.
        best: who keeps most there, in the means over seeds.
        ties: curves of other methods whose distance to the best lies within its interval over seeds.
        kept: curve -> what it keeps there; the reference's is among them.
        over: how much more the best keeps than the reference, with its interval over seeds; None of one seed.
        reached: share of the resamples of the seeds in which the best gets there; the interval is over those.
    """

    share: float
    task: float
    best: str
    ties: tuple[str, ...]
    kept: Mapping[str, float]
    over: Interval | None
    reached: float

    @property
    def verdict(self) -> str:
        """ "one seed", or by the interval: the best keeps "more" or "less" than the reference, or it is a "tie"; "rarely" is
        more as well, of a curve that does not get there with 95% confidence."""
        if self.over is None:
            return "one seed" if self.reached else "rarely"
        if self.over.low > 0:
            return "more" if self.reached >= CONFIDENCE else "rarely"
        return "less" if self.over.high < 0 else "tie"


def standing(
    results: Results, share: float, resamples: int = RESAMPLES, seed: int = 0
) -> Standing | None:
    """How the methods stand; None where the reference does not keep a number there, or no other method gets there.

    Differences are taken within the same resampled seeds, those in which both curves get there.
    """
    setting = results.best_setting(REFERENCE)
    if setting is None or results.base_point is None:
        return None
    seeds = SeedBootstrap(results, resamples, seed)

    def kept_by(label: str) -> np.ndarray:
        def at(draw: Draw) -> float:
            wanted = share * draw.points[REFERENCE][setting].task
            return float(draw.curves[label].at(np.array([wanted]))[0])

        return seeds.over(at)

    curves = results.curves()
    values = {
        label: kept_by(label)
        for label, (method, _) in curves.items()
        if method != REFERENCE or label == REFERENCE
    }
    kept = {label: float(of[0]) for label, of in values.items() if not np.isnan(of[0])}
    others = sorted((label for label in kept if label != REFERENCE), key=lambda c: -kept[c])
    if REFERENCE not in kept or not others:
        return None
    best = others[0]

    def ahead_of(label: str) -> tuple[Interval | None, float]:
        return seeds.interval(values[best] - values[label])

    several = len(results.seeds) > 1
    ties = tuple(
        label
        for label in others
        if several and curves[label][0] != curves[best][0]
        if (ahead := ahead_of(label)[0]) is not None and ahead.low <= 0
    )
    over, reached = ahead_of(REFERENCE) if several else (None, 1.0)
    task = share * seeds.means.points[REFERENCE][setting].task
    return Standing(share, task, best, ties, kept, over, reached)
