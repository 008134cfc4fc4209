"""What may foretell how much a training has forgotten: numbers that take no test of the knowledge.

RL's Razor (arXiv:2509.04259) says that the KL divergence to the base on the new task does; others look at the size of the
update; the anchor at the change of the layers' outputs on the knowledge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from corda_vlm.anchor import Anchor, anchor_penalty
from corda_vlm.covariance import CovarianceStore
from corda_vlm.data import BatchLoader, make_batches
from corda_vlm.errors import NotFiniteError
from corda_vlm.families import detect_family, unwrap
from corda_vlm.families.base import Processor, device_of, on_device
from corda_vlm.train.objectives import PromptObjective, make_objective
from corda_vlm.train.terms.kl_new import Comparable
from corda_vlm.train.terms.make import TaskData
from corda_vlm.train.terms.options import compares_with_base
from corda_vlm.train.terms.teacher import steady
from corda_vlm.train.terms.tokens import TOP, kl_terms, shares_of

RECORDS = 256
"""Of the new task, at most, that the divergence is taken on."""
_BATCH_SIZE = 64
_SEED = 0


class Predictors:
    """Made after the adapter is attached and before the first step: what the model is now counts as no change.

    Attributes:
        forecast: the anchor of the knowledge.
    """

    def __init__(self, forecast: Anchor) -> None:
        self.forecast = forecast
        self._others: dict[str, Anchor] = {}
        self._divergence: NewTaskChange | None = None

    def look_at(
        self,
        model: nn.Module,
        processor: Processor,
        data: TaskData,
        covariances: CovarianceStore | None,
    ) -> None:
        """Take what else there may be beside the forecast.

        Args:
            data: what is trained on.
            covariances: of the new task; the relative change of the layers' outputs there is taken if they are of every layer
                that the forecast looks at.
        """
        sites = self.forecast.sites
        self._others["update_size"] = anchor_penalty(
            model, metric="identity", sites=sites, beside=self.forecast
        )
        if covariances is not None and set(sites) <= set(covariances):
            self._others["task_change"] = anchor_penalty(
                model, task_store=covariances, metric="task", sites=sites, beside=self.forecast
            )
        self._divergence = new_task_change(model, processor, data)

    @torch.no_grad()
    def now(self) -> dict[str, float]:
        """Name -> value.

        `forecast`: the mean relative change of the layers' outputs on the knowledge, squared. `task_change`: the same on the
        new task. `update_size`: the mean over the layers of `‖ΔW‖_F / ‖W‖_F`. `kl_new`: KL of the base from the model on
        the new task, in nats.

        Raises:
            NotFiniteError: one is NaN or Inf.
        """
        values = {"forecast": float(self.forecast())}
        if (divergence := self._divergence) is not None:
            values["kl_new"] = divergence()
        for name, anchor in self._others.items():
            values[name] = _size(anchor.report()) if name == "update_size" else float(anchor())
        for name, value in values.items():
            if not math.isfinite(value):
                raise NotFiniteError(f"the {_CALLED.get(name, name)} is {value}")
        return values


_CALLED = {"forecast": "forecast of forgetting"}


def _size(shares: Mapping[str, float]) -> float:
    """The mean of the roots of relative squares."""
    return sum(math.sqrt(max(share, 0.0)) for share in shares.values()) / len(shares)


class NewTaskChange:
    """KL divergence of what an objective compares, the classes of prompts or the next tokens, from now to when it is called.

    Of next tokens the `TOP` most likely are kept, and all others together: at most the divergence over the whole
    vocabulary. Dropout is off, and records are not augmented.
    """

    def __init__(self, model: nn.Module, objective: Comparable, batches: BatchLoader) -> None:
        self.model, self.objective, self.batches = model, objective, batches
        self._kept = [self._shares(logits) for logits in self._logits()]

    @torch.no_grad()
    def __call__(self) -> float:
        total, count = 0.0, 0
        for logits, (top, before) in zip(self._logits(), self._kept, strict=True):
            before = before.to(logits.device)
            after = shares_of(logits, top.to(logits.device))
            # in float64: a sum of small differences
            total += float(kl_terms(before, after).sum(dtype=torch.float64))
            count += len(logits)
        return max(total / count, 0.0)  # rounding, where nothing has changed

    @torch.no_grad()
    def _logits(self) -> Iterator[Tensor]:
        for batch in self.batches:
            with steady(self.model):
                inputs = on_device(batch, device_of(self.model))
                yield self.objective.logits(unwrap(self.model), inputs).float()

    def _shares(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The places of the most likely, and the logarithms of their shares: of classes all."""
        width = logits.shape[1]
        kept = width if isinstance(self.objective, PromptObjective) else min(TOP, width)
        top = logits.topk(kept, dim=1).indices
        return top.cpu(), shares_of(logits, top).cpu()


def new_task_change(model: nn.Module, processor: Processor, task: TaskData) -> NewTaskChange | None:
    """The divergence on a fixed draw of the task's records; None where its loss compares nothing that the model knew
    before: of a new classifier, or of pairs."""
    options = task.options.complete(task.records.spec.format)
    if not compares_with_base(options, options.loss):
        return None
    family = detect_family(unwrap(model))
    objective = make_objective(
        options, model, family, processor, task.records, task.classes, task.templates
    )
    assert isinstance(objective, Comparable)
    batches = make_batches(
        task.records,
        processor,
        batch_size=min(_BATCH_SIZE, options.batch_size),
        shuffle=True,
        seed=_SEED,
        limit=RECORDS,
        towers=objective.towers,
        cache_mb=options.cache_mb,
        workers=options.workers,
        chat=options,
        must_learn=True,
    )
    return NewTaskChange(model, objective, batches)
