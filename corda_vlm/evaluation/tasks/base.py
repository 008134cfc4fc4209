"""What all kinds of tasks have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.predictions import Prediction
from corda_vlm.evaluation.scores import Outcome
from corda_vlm.evaluation.suite import Task
from corda_vlm.evaluation.tasks.registry import TASK_KINDS, Metric
from corda_vlm.options import renamed


@dataclass(frozen=True)
class TaskContext:
    """Where a task is measured.

    Attributes:
        what: "task NAME of suite NAME", for messages.
        load: (data spec, the file that names it) -> records, read once and under the suite's data folder.
    """

    what: str
    load: Callable[[str | Mapping[str, Any], Path | None], Any]


Setting = TaskContext
"""What it was called; a setting is a learning rate and a scale."""


class Evaluator(ABC):
    """A kind of task with its data and metrics, to be measured on any model.

    Attributes:
        data: the records.
    """

    data: Any

    @classmethod
    def build(cls, task: Task, data: Any, context: TaskContext) -> Evaluator:
        """What measures `task` on `data`; a class whose fields are its data, metrics and options needs no other."""
        fields: Any = cls
        try:
            return fields(data, task.metrics, **renamed(cls, task.options))
        except (CordaError, TypeError) as error:
            raise CordaError(f"{context.what}: {error}") from error

    def note(
        self,
        encoder: Encoder,
        index: int,
        said: str,
        right: Sequence[str],
        correct: float,
        metric: str,
        question: str | None = None,
    ) -> None:
        """Note what the model said of record `index`, where somebody asked for that; the rest as of `Prediction`."""
        if encoder.heard is not None:
            place = self.data.place(index)
            told = Prediction(index, place, said, tuple(right), float(correct), metric, question)
            encoder.heard.append(told)

    @property
    def examples(self) -> int | None:
        """How many examples are measured, None where that shows only on the way."""
        return len(self.data)

    def with_head(self, head: Callable[[Tensor], Tensor]) -> Evaluator:
        """The same judged by a trained classifier, where that has a meaning."""
        return self

    @abstractmethod
    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        """Yield for each metric what happened on each example."""

    def run(self, encoder: Encoder) -> Iterator[tuple[str, float]]:
        """Yield (metric, value), without confidence intervals."""
        for outcome in self.outcomes(encoder):
            yield outcome.metric, outcome.score("", "gain", resamples=1).value


def agree_on_bad(data: Any, encoder: Encoder) -> None:
    """Let every process know of the records that are of no use, which those have met that looked at them.

    Raises:
        DataError: they are more than `max_bad_share` of all.
    """
    every = encoder.together("the records of no use", lambda: dict(data.bad))
    data.bad.update(sorted(every.items()))
    data.check()


def known(metrics: Sequence[str], choices: Sequence[str], kind: str) -> None:
    """Refuse a metric that the kind of task does not have."""
    for metric in metrics:
        if metric not in choices:
            raise UnknownNameError(f"{kind} metric", metric, choices)


def registered(metrics: Sequence[str], kind: str) -> dict[str, Metric]:
    """Those of the metrics that were registered for this kind of task."""
    own = TASK_KINDS[kind].registered
    return {metric: own[metric] for metric in metrics if metric in own}


def shares(metric: str, values: Any, count: int) -> Float[np.ndarray, " n"]:
    """What a registered metric gave for `count` examples.

    Raises:
        CordaError: not a share from 0 to 1 for each of them.
    """
    try:
        given = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CordaError(f"the metric {metric!r} gave no numbers: {error}") from error
    if given.shape != (count,):
        raise CordaError(
            f"the metric {metric!r} gave values of shape {given.shape}; it must give one for each of {count} examples"
        )
    if not ((given >= 0) & (given <= 1)).all():
        raise CordaError(
            f"the metric {metric!r} gave values outside 0 to 1, or NaN; it must give a share for each example"
        )
    return given
