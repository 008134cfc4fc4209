"""Invented results of models, in no format of any tool. None of these numbers was ever measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.report.formats.base import Measure, Measured, samples_of


def measure(task: str, scores: Sequence[float], **more: Any) -> Measure:
    """A task with these scores of its samples, whose ids are their places."""
    by_id = {str(place): float(score) for place, score in enumerate(scores)}
    more = {"metric": "acc", "file": Path(f"{task}.json"), "chance": 0.0, **more}
    samples = samples_of(by_id, more["metric"])
    return Measure(task, value=float(np.mean(scores)), n=len(scores), samples=samples, **more)


def told(task: str, value: float, **more: Any) -> Measure:
    """A task of which only the score is told."""
    return Measure(
        task, value=value, **{"metric": "acc", "file": Path(f"{task}.json"), "chance": 0.0, **more}
    )


def model(name: str, *measures: Measure) -> Measured:
    return Measured(name, ("invented",), measures)


def right(share: float, n: int = 200) -> list[float]:
    """Of n samples the first share is right."""
    return [float(place < share * n) for place in range(n)]


def interval(value: Interval | float | None) -> Interval:
    """A value that has to have an interval."""
    assert isinstance(value, Interval)
    return value
