"""KL to the base on the new task: what the model answers there is to stay near what it would have answered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.errors import CordaError
from corda_vlm.families import unwrap
from corda_vlm.families.base import Batch, device_of, on_device
from corda_vlm.train.next_token import NextTokenObjective
from corda_vlm.train.objectives import Objective, PromptObjective
from corda_vlm.train.terms.before import Before
from corda_vlm.train.terms.teacher import steady
from corda_vlm.train.terms.term import BatchPenalty


class NewTaskDivergence(BatchPenalty):
    """KL divergence of what an objective compares, the classes of prompts or the next tokens, from before training to now.

    The model is run as it was at each step, not looked up: a task's records are many, and augmented ones are others each time.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.model = model
        self.objective = _comparable(objective)
        self._before = Before(model)

    def __call__(self, batch: Batch) -> Float[Tensor, ""]:
        batch = on_device(batch, device_of(self.model))
        with self._before.running() as base:
            before = self.objective.logits(base, batch)
        with steady(self.model):
            after = self.objective.logits(unwrap(self.model), batch)
        with torch.autocast(after.device.type, enabled=False):
            log_before, log_after = before.float().log_softmax(1), after.float().log_softmax(1)
            return F.kl_div(log_after, log_before, log_target=True, reduction="batchmean")


Comparable = PromptObjective | NextTokenObjective
"""Objectives that compare what the model could tell apart before training."""


def _comparable(objective: Objective) -> Comparable:
    if isinstance(objective, Comparable):
        return objective
    raise CordaError(
        "kl_new compares the probabilities of classes or tokens with those before training, and a "
        f"{type(objective).__name__.removesuffix('Objective').lower()} loss has no such: its classes are new, or it has "
        "none. Choose the prompt or next_token loss, or take distill in place of kl_new"
    )
