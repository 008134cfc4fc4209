"""What else a training minimizes, besides the loss of its task; read before PyTorch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from corda_vlm.anchor.options import AnchorOptions
from corda_vlm.errors import CordaError
from corda_vlm.options import Count, NotNegative, check_options

DistillLoss = Literal["auto", "cosine", "similarity", "tokens"]
ReplayLoss = Literal["auto", "prompt", "contrastive", "next_token"]


@dataclass(frozen=True, kw_only=True)
class TermOptions(AnchorOptions):
    """The terms of the loss that hold a training to what the model knew, for any method.

    A weight of 0 leaves a term out. Terms may be used together.

    Attributes:
        distill: Weight of distillation: on records of the knowledge, the model is to give what it gave before training.
        distill_loss: "cosine": 1 − cosine between its embeddings and those from before; "similarity": the KL divergence
            between the rows of their similarity matrices; "tokens": of the next-token distributions, on the answers;
            "auto": tokens for models that generate text, else cosine.
        distill_batch_size: Records of the knowledge a step.
        distill_every: Distillation is added at every so many steps only, with so many times the weight.
        replay: Weight of the knowledge's own loss: its records are learned as those of the task are.
        replay_loss: "prompt": cross-entropy to the prompts of the knowledge's class names; "contrastive": CLIP's loss
            over its pairs of image and text; "next_token": of its answers; "auto": next_token for models that generate
            text, else prompt for records with labels, else contrastive.
        replay_templates: The prompts of the knowledge's class names, `{}` is the class.
        replay_batch_size: Records of the knowledge a step.
        replay_every: Replay is added at every so many steps only, with so many times the weight.
    """

    distill: NotNegative = 0.0
    distill_loss: DistillLoss = "auto"
    distill_batch_size: Count = 32
    distill_every: Count = 4
    replay: NotNegative = 0.0
    replay_loss: ReplayLoss = "auto"
    replay_templates: tuple[str, ...] = ("{}",)
    replay_batch_size: Count = 32
    replay_every: Count = 1

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def needs_data(self) -> list[str]:
        """The names of the terms that look at records of the knowledge."""
        return [name for name in ("distill", "replay") if getattr(self, name) > 0]

    def check_data(self, has_data: bool, remedy: str) -> None:
        """Raise `CordaError` if a term looks at records of the knowledge, and there are none.

        Args:
            remedy: how to say which they are, e.g. "give --knowledge".
        """
        if not has_data and (names := self.needs_data):
            raise CordaError(
                f"{names[0]} looks at records of the knowledge while the model trains, and there are none: {remedy}, or leave "
                f"{names[0]} out"
            )
