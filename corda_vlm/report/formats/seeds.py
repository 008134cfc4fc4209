"""Trainings that differ in their seed alone, as one model: means, with intervals that cover the luck of training and of examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from corda_vlm.errors import CordaError
from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.files import shown
from corda_vlm.report.formats.base import Measure

# Student's t at 97.5 % for 1 to 10 degrees of freedom: with few seeds their spread is itself hardly known
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.96


def over_seeds(trainings: Sequence[Sequence[Measure]]) -> list[Measure]:
    """The measures of several trainings as those of one model; of one training they stay as they are.

    A task is the mean of those trainings that were measured on it.

    Raises:
        CordaError: they were not measured alike on a task.
    """
    if len(trainings) == 1:
        return list(trainings[0])
    by_task: dict[tuple[str, str], list[Measure]] = {}
    for measures in trainings:
        for one in measures:
            by_task.setdefault((one.task, one.metric), []).append(one)
    return [_mean(alike) if len(alike) > 1 else alike[0] for alike in by_task.values()]


def _mean(alike: Sequence[Measure]) -> Measure:
    first = alike[0]
    for one in alike:
        for name, value in first.conditions.items():
            if one.conditions.get(name) != value:
                raise CordaError(
                    f"{one.task!r} was not measured alike after trainings that differ in their seed: the {name} is {value} and "
                    f"{one.conditions.get(name)}; evaluate them again with the same. In {shown(one.file)}"
                )
    intervals = [one.interval for one in alike]
    value = mean_interval([one.value for one in alike], intervals)
    gains = [one.gain for one in alike]
    gain = None
    if all(one is not None for one in gains):
        gain = mean_interval([one.value for one in gains if one is not None], gains)
    return replace(
        first, value=value.value, low=value.low, high=value.high, gain=gain, seeds=len(alike), samples=None
    )  # fmt: skip


def mean_interval(values: Sequence[float], own: Sequence[Interval | None]) -> Interval:
    """The mean of one number over seeds, and its 95 % interval.

    Half its width is the root of two squares: that of the mean over seeds, by Student's t, and the mean square of the seeds' own
    half widths over examples. These are not divided by the number of seeds, as all of them see the same examples.

    Args:
        own: the seeds' own intervals over examples, as far as there are any.
    """
    mean, count = float(np.mean(values)), len(values)
    t = _STUDENT[count - 2] if count - 2 < len(_STUDENT) else _NORMAL
    of_seeds = t * float(np.std(values, ddof=1)) / math.sqrt(count)
    halves = [(one.high - one.low) / 2 for one in own if one is not None]
    of_examples = float(np.mean(np.square(halves))) if halves else 0.0
    half = math.sqrt(of_seeds**2 + of_examples)
    return Interval(mean, mean - half, mean + half)
