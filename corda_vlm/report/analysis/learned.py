"""Has a method learned the task at all? Only where it has is there anything to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.report.analysis.curve import Setting
from corda_vlm.report.analysis.results import REFERENCE, Results


@dataclass(frozen=True)
class Learned:
    """A method at the setting that learns the task best, against the model before training.

    Attributes:
        setting: its best learning rate, see `Results.best_setting`.
        task: accuracy on the gain tasks, the mean over seeds.
        base: the same before training.
        gain: task − base with the interval over the test examples, paired; None where the scores do not tell it.
        verdict: "yes": above the base model beyond the interval; "no": not above it, or not beyond the interval;
            "unknown": above it, but the scores have no paired interval, and the two models' own overlap.
    """

    method: str
    setting: Setting
    task: float
    base: float
    gain: Interval | None
    verdict: Literal["yes", "no", "unknown"]


def learned(results: Results, method: str) -> Learned | None:
    """What a method has learned at its best; None where none of its trainings is measured to the end.

    Seeds share the test examples, so the interval of their mean is at most as wide as their intervals are on average, and
    that is what is taken. Where rows tell no paired interval, two that do not overlap decide the same: however the
    two models' errors go together, their difference is then beyond its interval.
    """
    setting, base = results.best_setting(method), results.base_point
    if setting is None or base is None:
        return None
    seeds = results.points(method)[setting]
    task = float(np.mean([point.task for point in seeds.values()]))
    places = [(method, setting, seed, name) for seed in seeds for name in results.gain]
    gain = None
    if all(place in results.gains for place in places):
        paired = [results.gains[place] for place in places]
        gain = _mean(paired)
    if gain is not None:
        verdict = "yes" if gain.low > 0 else "no"
    elif task <= base.task:
        verdict = "no"
    else:
        verdict = "yes" if _apart(results, places) else "unknown"
    return Learned(method, setting, task, base.task, gain, verdict)


def reference_learned(results: Results) -> bool:
    """Has the method learned the task at whose accuracy all are compared?"""
    reference = learned(results, REFERENCE)
    return reference is not None and reference.verdict == "yes"


def all_learned(results: Results) -> list[Learned]:
    """Every method that is measured, the one that learned most first."""
    every = (learned(results, method) for method in results.trained)
    return sorted((one for one in every if one is not None), key=lambda one: -one.task)


def _apart(results: Results, places: Sequence[tuple[str, Setting, int | None, str]]) -> bool:
    """Do the two models' own intervals over examples not overlap?"""
    high = {
        row["task"]: row.get("high")
        for row in results.base_rows
        if results.primary[row["task"]] == row["metric"]
    }
    own = [results.intervals.get(place) for place in places]
    above = [high.get(name) for name in results.gain]
    if any(one is None for one in (*own, *above)):
        return False
    lowest = np.mean([one.low for one in own if one is not None])
    return bool(lowest > np.mean([value for value in above if value is not None]))


def _mean(intervals: Sequence[Interval]) -> Interval:
    return Interval(
        *(
            float(np.mean([getattr(i, name) for i in intervals]))
            for name in ("value", "low", "high")
        )
    )
