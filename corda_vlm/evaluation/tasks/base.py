"""What all kinds of tasks have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from corda_vlm.errors import UnknownNameError
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.scores import Outcome


class Evaluator(ABC):
    """A kind of task with its data and metrics, to be measured on any model."""

    @abstractmethod
    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        """Yield for each metric what happened on each example."""

    def run(self, encoder: Encoder) -> Iterator[tuple[str, float]]:
        """Yield (metric, value), without confidence intervals."""
        for outcome in self.outcomes(encoder):
            yield outcome.metric, outcome.score("", "gain", resamples=1).value


def known(metrics: Sequence[str], choices: Sequence[str], kind: str) -> None:
    """Refuse a metric that the kind of task does not have."""
    for metric in metrics:
        if metric not in choices:
            raise UnknownNameError(f"{kind} metric", metric, choices)
