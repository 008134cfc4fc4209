"""Training: transformers' Trainer with losses for models that compare images with texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.train.budget import Budget, forgetting_budget
    from corda_vlm.train.gradient import task_gradient
    from corda_vlm.train.heads import DEFAULT_TEMPLATES, Head, Template, prompt_logits
    from corda_vlm.train.loop import TrainingInterrupted, train
    from corda_vlm.train.losses import contrastive_loss
    from corda_vlm.train.options import (
        GradientOptions,
        LossOptions,
        TaskGradientOptions,
        TrainOptions,
        TrainResult,
    )
    from corda_vlm.train.penalty import AnchorMixin, PenaltyMixin

_HOMES = {
    "DEFAULT_TEMPLATES": "heads",
    "AnchorMixin": "penalty",
    "Budget": "budget",
    "GradientOptions": "options",
    "Head": "heads",
    "LossOptions": "options",
    "PenaltyMixin": "penalty",
    "TaskGradientOptions": "options",
    "Template": "heads",
    "TrainOptions": "options",
    "TrainResult": "options",
    "TrainingInterrupted": "loop",
    "contrastive_loss": "losses",
    "forgetting_budget": "budget",
    "prompt_logits": "heads",
    "task_gradient": "gradient",
    "train": "loop",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
