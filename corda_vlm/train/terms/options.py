"""What else a training minimizes, besides the loss of its task; read before PyTorch is imported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from corda_vlm.anchor.options import AnchorOptions
from corda_vlm.errors import CordaError
from corda_vlm.options import Count, NotNegative, Share
from corda_vlm.train.budget.options import BudgetOptions
from corda_vlm.train.options import Loss, TrainOptions

_TERMS = ("distill", "replay", "kl_new", "ewc", "start_decay")

DISTILL = 30.0
"""The weight of distillation where knowledge is given and no term is named."""
STEERED = ("distill", "anchor", "replay", "ewc", "kl_new")
"""The terms whose weight a budget may steer: the first that has one."""

UNSTEERED = ("strength", "stop")
"""Ways to keep a budget that leave the weights of terms as they are."""

START = {"distill": 10.0, "anchor": 30.0}
"""Weights to start from, of those that a budget chooses itself."""

DistillLoss = Literal["auto", "cosine", "similarity", "tokens"]
StartDecayKind = Literal["decoupled", "l2"]
ReplayLoss = Literal["auto", "prompt", "contrastive", "next_token"]


@dataclass(frozen=True, kw_only=True)
class TermOptions(AnchorOptions, BudgetOptions):
    """The terms of the loss that hold a training to what the model knew, for any method.

    A weight of 0 leaves a term out. Terms may be used together; `keep` in their place finds a weight.

    Attributes:
        distill: Weight of distillation: on records of the knowledge, the model is to give what it gave before training.
        distill_loss: "cosine": 1 − cosine between its embeddings and those from before; "similarity": the KL divergence
            between the rows of their similarity matrices; "tokens": of the next-token distributions, on the answers;
            "auto": tokens for models that generate text, else cosine.
        distill_batch_size: Records of the knowledge a step.
        distill_every: Distillation is added at every so many steps only, with so many times the weight.
        replay: Weight of the knowledge's own loss: its records are learned as those of the task are.
        replay_share: Replay in place of a weight: of each step's records, `batch_size` in all, this share is of the knowledge
            and the others of the task, and every record counts alike; the steps stay as many.
        replay_loss: "prompt": cross-entropy to the prompts of the knowledge's class names; "contrastive": CLIP's loss
            over its pairs of image and text; "next_token": of its answers; "auto": next_token for models that generate
            text, else prompt for records with labels, else contrastive.
        replay_templates: The prompts of the knowledge's class names, `{}` is the class.
        replay_batch_size: Records of the knowledge a step.
        replay_every: Replay is added at every so many steps only, with so many times the weight.
        kl_new: Weight of the KL divergence from what the model answered before training, on the new task's own batch: over
            the classes of its prompts, or over the next tokens.
        kl_new_every: It is added at every so many steps only, with so many times the weight.
        ewc: Weight of elastic weight consolidation: the change of each weight, squared, times the diagonal of the Fisher
            information on records of the knowledge. Of an adapter the weight that it adapts counts.
        ewc_every: It is added at every so many steps only, with so many times the weight.
        start_decay: Decay of the trained matrices towards where they started; `weight_decay` of a training pulls to zero.
        start_decay_kind: "decoupled": apart from the gradients, as AdamW's; "l2": through them.
    """

    distill: NotNegative = 0.0
    distill_loss: DistillLoss = "auto"
    distill_batch_size: Count = 16
    distill_every: Count = 3
    replay: NotNegative = 0.0
    replay_share: Share = 0.0
    replay_loss: ReplayLoss = "auto"
    replay_templates: tuple[str, ...] = ("{}",)
    replay_batch_size: Count = 16
    replay_every: Count = 3
    kl_new: NotNegative = 0.0
    kl_new_every: Count = 4
    ewc: NotNegative = 0.0
    ewc_every: Count = 1
    start_decay: NotNegative = 0.0
    start_decay_kind: StartDecayKind = "decoupled"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_budget()
        if self.replay > 0 and self.replay_share > 0:
            raise CordaError(
                f"replay ({self.replay:g}) is a weight, and replay_share ({self.replay_share:g}) gives every record the same; "
                "choose one of the two"
            )

    @property
    def steered(self) -> str | None:
        """The option that is the weight to be steered for the budget; None where none has a weight to start from."""
        if self.keep is None or self.keep_by in UNSTEERED:
            return None
        choices = STEERED if self.keep_by == "auto" else (self.keep_by,)
        return next((name for name in choices if getattr(self, name) > 0), None)

    def with_budget(
        self, *, has_data: bool, has_store: bool, output_side: bool = False
    ) -> TermOptions:
        """With a weight to start from of the term that is steered for the budget, where none has one.

        Args:
            has_data: whether there are records of the knowledge for terms.
            has_store: whether there are covariances of it.
            output_side: whether these have the output side.

        Raises:
            CordaError: what is to be steered lacks what it looks at.
        """
        if self.keep is None or self.keep_by in UNSTEERED or self.steered is not None:
            return self
        if self.keep_by in ("auto", "distill") and has_data:
            return replace(self, distill=START["distill"])
        if self.keep_by == "distill":
            raise CordaError(
                "keep_by distill steers distillation, which looks at records of the knowledge while the model trains, and there are "
                "none: name them, or take keep_by anchor or strength"
            )
        if has_store or (self.keep_by == "anchor" and self.anchor_metric != "knowledge"):
            usual = self.anchor_metric == "knowledge" and self.anchor_output == "none"
            output = "kfac" if output_side and usual else self.anchor_output
            return replace(self, anchor=START["anchor"], anchor_output=output)
        if self.keep_by == "anchor":
            raise CordaError(
                "keep_by anchor steers the anchor, which needs covariances of the knowledge, and there are none: name them, or take "
                "keep_by distill or strength"
            )
        return self

    def shared(self, training: TrainOptions) -> tuple[TermOptions, TrainOptions]:
        """With a share of replay the term that it is, and the training that leaves it room in its batches.

        The loss is `(1 − s)` times what is returned, which Adam does not see: `task + s / (1 − s) · replay`.

        Raises:
            CordaError: a batch that cannot be shared.
        """
        if self.replay_share <= 0:
            return self, training
        whole = training.batch_size
        if whole < 2:
            raise CordaError(
                "replay_share divides the records of a batch, and batch_size is 1: give a larger one, or replay with a weight"
            )
        old = min(max(1, round(self.replay_share * whole)), whole - 1)
        return (
            replace(
                self,
                replay=old / (whole - old),
                replay_share=0.0,
                replay_batch_size=old * training.gradient_accumulation,
                replay_every=1,
            ),
            replace(training, batch_size=whole - old),
        )

    def with_data(self) -> TermOptions:
        """These options where records of the knowledge are at hand: distillation, unless another term looks at them, or a budget
        chooses."""
        chosen = self.needs_data or self.keep is not None
        return self if chosen else replace(self, distill=DISTILL)

    @property
    def needs_data(self) -> list[str]:
        """The names of the terms that look at records of the knowledge."""
        return [name for name in ("distill", "replay", "ewc") if self._has(name)]

    @property
    def names(self) -> list[str]:
        """The names of the terms that have a weight, the anchor aside."""
        return [name for name in _TERMS if self._has(name)]

    def _has(self, name: str) -> bool:
        return getattr(self, name) > 0 or (name == "replay" and self.replay_share > 0)

    def check_training(self, training: TrainOptions, loss: Loss) -> None:
        """Raise `CordaError` if a term contradicts what a training does.

        Args:
            loss: that of the training, where "auto" has been settled.
        """
        self.shared(training)  # raises
        if self.start_decay > 0 and training.weight_decay > 0:
            raise CordaError(
                f"start_decay ({self.start_decay:g}) pulls the weights to where they started, and weight_decay "
                f"({training.weight_decay:g}) pulls them to zero; choose one of the two"
            )
        if self.kl_new <= 0:
            return
        if compares_with_base(training, loss):
            return
        if loss not in _COMPARABLE:
            raise CordaError(
                f"kl_new compares probabilities of classes or tokens with those before training, and the {loss} loss has none "
                "that the model had before; choose the prompt or next_token loss, or distill in place of kl_new"
            )
        raise CordaError(
            "kl_new compares the classes of the prompts with those before training, and train_head trains class vectors "
            "apart from the prompts; leave one of the two out"
        )

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


_COMPARABLE = ("prompt", "next_token")


def compares_with_base(training: TrainOptions, loss: Loss) -> bool:
    """Whether what a loss compares, classes or tokens, had probabilities before training."""
    return loss in _COMPARABLE and not training.train_head
