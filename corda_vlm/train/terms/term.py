"""One term of the loss, and what of it decides about the weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from corda_vlm.errors import CordaError
from corda_vlm.train.budget.options import KEEP, WEIGHT

Penalty = Callable[[], Tensor]
"""() -> scalar, differentiable: a term that looks at the weights alone."""


class DataPenalty(ABC):
    """A term that looks at records: called with the number of its batch, from 0 on.

    What its batch n holds is a function of n and of a seed alone, so that a training that is gone on with is the same one.
    """

    @abstractmethod
    def __call__(self, number: int) -> Tensor:
        """The penalty on its batch `number`: a scalar, differentiable."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides about its values, as JSON."""


class BatchPenalty(ABC):
    """A term that looks at the task's own batch of a step: of several that are accumulated, at the last."""

    @abstractmethod
    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """The penalty on a batch of the task: a scalar, differentiable."""


@dataclass(frozen=True)
class Term:
    """What a training minimizes besides the loss of its task.

    Attributes:
        name: its key in logs and in the history, where it is not weighted.
        penalty: a function without arguments, which looks at the weights; or one of records, or of the task's batch.
        weight: the loss gets so many times the penalty; 0 only logs it, without gradients.
        every: only at every so many steps, with so many times the weight: the sum over steps is the same.
        identity: what else decides about the weights, as JSON, for the plan of a training. That of a `DataPenalty` is its
            own.

    Raises:
        CordaError: a weight that is negative or not finite, or `every` below 1.
    """

    name: str
    penalty: Penalty | DataPenalty | BatchPenalty
    weight: float = 1.0
    every: int = 1
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_weight(self.weight, self.name)
        if self.every < 1:
            raise CordaError(f"{self.name!r}: every is {self.every}; it counts steps, from 1 on")

    @property
    def plan(self) -> dict[str, Any]:
        """What of it decides about the weights, as JSON."""
        own = self.penalty.identity if isinstance(self.penalty, DataPenalty) else {}
        return {"weight": self.weight, "every": self.every, **own, **self.identity}

    def value(self, step: int, batch: Mapping[str, Any] | None = None) -> Tensor:
        """The penalty at a step, whose last batch is `batch`, not weighted."""
        if isinstance(self.penalty, BatchPenalty):
            assert batch is not None  # the trainer has one at every step
            return self.penalty(batch)
        if isinstance(self.penalty, DataPenalty):
            return self.penalty(step // self.every)
        return self.penalty()


def check_names(terms: Iterable[Term]) -> None:
    """Raise `CordaError` if two terms have one name, which is their key in the history, or that of something else."""
    names: list[str] = list(_TAKEN)
    for term in terms:
        if term.name in names:
            raise CordaError(
                f"two terms of the loss, or a term and another entry of the history, are called {term.name!r}; give it "
                "another name"
            )
        names.append(term.name)


_TAKEN = (
    "step", "epoch", "seconds", "loss", "learning_rate", "grad_norm", "samples_per_second", KEEP, WEIGHT,
)  # fmt: skip


def check_weight(weight: float, name: str) -> None:
    """Raise `CordaError` unless `weight` is a number from zero on."""
    if not (math.isfinite(weight) and weight >= 0):
        raise CordaError(
            f"the weight of {name!r} is {weight}; it must be a number from 0 (only logged) on"
        )
