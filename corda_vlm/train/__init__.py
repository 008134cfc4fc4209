"""Training: transformers' Trainer with losses for models that compare images with texts."""

from corda_vlm.train.heads import DEFAULT_TEMPLATES, Head, Template, prompt_logits
from corda_vlm.train.loop import TrainingInterrupted, train
from corda_vlm.train.losses import contrastive_loss
from corda_vlm.train.options import TrainOptions, TrainResult
from corda_vlm.train.penalty import AnchorMixin, PenaltyMixin

__all__ = [
    "DEFAULT_TEMPLATES",
    "AnchorMixin",
    "Head",
    "PenaltyMixin",
    "Template",
    "TrainOptions",
    "TrainResult",
    "TrainingInterrupted",
    "contrastive_loss",
    "prompt_logits",
    "train",
]
