"""A forgetting budget: steered while a model trains, and met by the strength that is taken in the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from corda_vlm.data import Records
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.errors import CordaError
from corda_vlm.families.base import Processor, unwrap
from corda_vlm.progress import Meter, showing
from corda_vlm.train.budget.kept import Kept, check_count, check_probe, kept_of, share_kept
from corda_vlm.train.budget.options import BudgetOptions, KeepMetric, check_keep
from corda_vlm.train.budget.probe import HowProbed, Probe, Values, make_probe
from corda_vlm.train.budget.spent import Spent
from corda_vlm.train.budget.strength import Course, largest_strength

logger = logging.getLogger(__name__)


@dataclass
class Budget:
    """Made by `forgetting_budget`, of a model before its first step.

    Attributes:
        model: as it is trained.
        probe: the records that tell.
        keep: the share of what was known that is to be kept.
        every: steps between two looks.
        term: the name of the term of the loss whose weight is steered; None for none.
        stops: whether the training ends early, where the probe falls below the budget.
    """

    model: nn.Module
    probe: Probe
    keep: float
    every: int
    term: str | None
    stops: bool
    _before: list[Values] = field(repr=False)
    _course: Course = field(repr=False)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides about the weights, as JSON."""
        return {
            "keep": self.keep,
            "term": self.term,
            "every": self.every if self.looks else None,
            **({"stops": True} if self.stops else {}),
            **self.probe.identity,
        }

    @property
    def looks(self) -> bool:
        """Whether the probe is looked at while the model trains."""
        return self.term is not None or self.stops

    @property
    def telling(self) -> list[int]:
        """The parts of the probe that have records, which looks take in turn."""
        return [part for part, values in enumerate(self._before) if len(values)]

    def check_model(self, model: nn.Module) -> None:
        """Raise `CordaError` unless this is the budget of a model."""
        if unwrap(self.model) is not unwrap(model):
            raise CordaError(
                "the budget was made of another model than the one to train, and would say nothing of it; make it with "
                "forgetting_budget(model, probe, keep) of this one"
            )

    def look(self, number: int) -> float:
        """The share that is kept of one part of the probe, the parts in turn."""
        part = self.telling[number % len(self.telling)]
        with _quietly():
            now = self.probe.look(self.model, part)
        known = float(np.concatenate(self._before).mean()) - self.probe.chance
        return share_kept(now, self._before[part], known)

    def kept(self) -> Kept:
        """What the whole probe says now, with its interval."""
        with _quietly():
            now = self.probe.look_at_all(self.model)
        return kept_of(now, np.concatenate(self._before), self.probe.chance)

    def spend(
        self,
        measure: Callable[[], Mapping[str, float]] | None = None,
        weight: float | None = None,
    ) -> Spent:
        """Give the trained model the largest strength that keeps the budget, for good.

        Args:
            measure: tells loss and accuracy on the task's own batches.
            weight: that of the steered term at the end.
        """
        self._course.arrive()
        seen: dict[float, Kept] = {}

        def keeps(strength: float) -> bool:
            self._course.go_to(strength)
            seen[strength] = self.kept()
            return seen[strength].share >= self.keep

        def cost() -> Mapping[str, float]:
            return {} if measure is None else measure()

        at_full = cost()
        strength = largest_strength(keeps)
        self._course.go_to(strength)
        kept = seen[strength] if strength in seen else self.kept()
        spent = Spent(
            self.keep, self.probe.metric, strength, kept, seen[1.0],
            at_full if strength == 1.0 else cost(), at_full, weight, self.term,
        )  # fmt: skip
        if strength == 0.0:
            logger.warning(
                "not a hundredth of what was learned can be kept within the budget: the model is as before. Lower keep (%g) or "
                "the learning rate, or hold to the knowledge with a term of the loss",
                self.keep,
            )
        return spent


@contextmanager
def _quietly() -> Iterator[None]:
    """What looks at records counts them, and a training that is under way counts steps."""
    with showing(False), Meter("probe"):
        yield


def forgetting_budget(
    model: nn.Module,
    probe: Records | Sequence[Mapping[str, Tensor]],
    keep: float,
    *,
    processor: Processor | None = None,
    term: str | None = None,
    stop: bool = False,
    every: int = BudgetOptions.keep_every,
    metric: KeepMetric = BudgetOptions.keep_metric,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] = BudgetOptions.probe_templates,
    bf16: bool = False,
    chat: ChatOptions | None = None,
) -> Budget:
    """The budget of a model that is ready to train: what it says of the probe now counts as what it knows.

    Build it before a checkpoint is loaded.

    Args:
        model: as it is trained, of any method.
        probe: records that no term of the loss looks at; or ready batches of them, as for `distillation`.
        keep: the share of what it knows that is to be kept, above 0 (chance) and at most 1.
        processor: the model's, for records.
        term: the name of the term of the loss whose weight is steered, with a weight above 0, which is where it starts; None
            for none: then the strength in the end alone meets the budget.
        stop: whether the training ends early, where the mean of the last look at each part of the probe is below the budget.
        every, metric, templates: as of `BudgetOptions`.
        classes: names for the prompts; None takes the probe's own.
        bf16: whether the model is run under bfloat16 autocast.
        chat: how conversations become tokens.

    Raises:
        CordaError: no such share, a probe too small to tell, of which the model knows nothing, or whose metric is not for
            this model; or nothing is trained.
        DataError: the records lack what the metric needs.
    """
    check_keep(keep)
    if stop and term is not None:
        raise CordaError(
            f"the weight of {term} is to be steered for the budget, and the training to stop where it is not kept; leave term or stop out"
        )
    if every < 1:
        raise CordaError(f"every is {every}; it counts steps between two looks, from 1 on")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise CordaError(
            "a budget holds what training changes of a model, and nothing of this one is trained; leave keep out"
        )
    if isinstance(probe, Records) and not len(probe):
        check_count(0, keep, f"{probe.spec}:")
    how = HowProbed(processor, metric, classes, templates, bf16, chat or ChatOptions())
    made = make_probe(model, probe, how)
    with _quietly():
        before = [made.look(model, part) for part in range(made.parts)]
    check_probe(np.concatenate(before), made.chance, keep, made.metric, made.what)
    return Budget(model, made, keep, every, term, stop, before, Course(model))
