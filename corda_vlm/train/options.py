"""What one training is: its options, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.errors import CordaError
from corda_vlm.families.options import SiteOptions
from corda_vlm.options import Count, Items, NotNegative, Positive, Range, Seed, Share, check_options
from corda_vlm.precision import Bf16

if TYPE_CHECKING:
    from corda_vlm.train.budget.spent import Spent
    from corda_vlm.train.heads import Head

Trackers = Annotated[Sequence[Literal["tensorboard", "wandb", "trackio"]], Items(distinct=True)]
Loss = Literal["auto", "prompt", "linear", "contrastive", "next_token"]
Schedule = Literal["cosine", "linear", "constant"]
Augment = Literal["none", "light"]
Attention = Literal["auto", "math", "default"]
Workers = Annotated[int, Range(at_least=0, at_most=256)]


@dataclass(frozen=True, kw_only=True)
class LossOptions(ChatOptions):
    """What of a batch is minimized.

    Attributes:
        loss: "prompt": cross-entropy of scaled cosines to class prompts; "linear": a new linear classifier on
            the image features; "contrastive": CLIP's symmetric loss over image-text pairs; "next_token": the
            answers of conversations, for models that generate text; "auto": next_token for data with a format, else prompt.
        label_smoothing: Of the cross-entropy, from 0 to below 1.
        mask_duplicates: With "contrastive": a text that occurs twice in a batch is not its own negative.
    """

    loss: Loss = "auto"
    label_smoothing: Share = 0.0
    mask_duplicates: bool = True

    def __post_init__(self) -> None:
        check_options(self)

    def loss_for(self, format: str | None) -> Loss:
        """The loss that is meant for data of this format; never "auto"."""
        if self.loss != "auto":
            return self.loss
        return "prompt" if format is None else "next_token"


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """From how much of the new task the gradient of its loss is taken, for methods that start from it.

    Attributes:
        batches: At most so many batches.
        batch_size: Records a batch; in an experiment no more than the training has, with so many more batches.
        seed: Of the draw of the records.
    """

    batches: Count = 8
    batch_size: Count = 64
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class TaskGradientOptions(GradientOptions, LossOptions, SiteOptions):
    """The gradient of which loss, on how many records, with respect to which weight matrices."""

    def __post_init__(self) -> None:
        SiteOptions.__post_init__(self)
        if self.loss == "linear":
            raise CordaError(
                "a linear classifier starts at zero, where its loss has no gradient to give to the model; take the gradient of "
                "the prompt loss"
            )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LossOptions):
    """One training.

    Attributes:
        steps: Optimizer steps. Give this or `epochs`; without either it is three epochs.
        epochs: Passes over the data.
        batch_size: Records a step; the last batch of an epoch may be smaller.
        learning_rate: The peak rate.
        head_learning_rate: The rate of a trained head; the default is `learning_rate`.
        projector_learning_rate: The rate of what is trained of a vision-language model's projector, whole
            (`modules_to_save`) or by its adapters; the default is `learning_rate`.
        schedule: "cosine", "linear" (both to zero) or "constant", after the warm-up.
        warmup_ratio: The share of the steps in which the rate rises linearly from zero.
        weight_decay: AdamW's, on matrices only; vectors (biases, norms, scales) are left alone. It pulls an
            adapter's factors to zero, not to where they started: the default is none.
        betas: AdamW's.
        ema: The decay of a moving average of the trained weights, which is then the result, and what is evaluated on the way:
            0.99 averages about the last 100 steps. 0 keeps none.
        max_grad_norm: Gradients are scaled down to this norm, the head's apart; 0 leaves them.
        train_head: With "prompt": the class vectors start at the prompts and are trained.
        augment: "none" or "light" (small rotations, shifts and zooms of the preprocessed batch).
        bf16: Run the model under bfloat16 autocast; losses and weights stay in float32. "auto": where the device
            multiplies bfloat16 faster than float32, see `corda_vlm.precision`; a training that is gone on with keeps
            what it began with.
        attention: "auto", "math" or "default". PyTorch's MATH attention trains a ViT of 64 px and patch 16 under
            bfloat16 on a CPU 1.8 times faster than its default: "auto" takes it there for up to 128 tokens, and
            PyTorch's own choice elsewhere (`corda_vlm.train.trainer.takes_math` has the timings).
        gradient_accumulation: Batches a step.
        gradient_checkpointing: Compute each block's activations again for its gradients in place of keeping them: the
            same weights, less memory, about a third more time. For models of transformers.
        eval_every: Steps between two evaluations on `eval_data`; the default is only at the end.
        save_every: Steps between checkpoints; the default is every two minutes.
        log_every: Steps between entries of the history.
        report_to: Trackers that get the history too, the terms of the loss and what the probe keeps with it, through transformers:
            "tensorboard" (into `runs/` of the training's folder, or TENSORBOARD_LOGGING_DIR), "wandb", "trackio".
        seed: Of the data order, the augmentation and dropout.
        cache_mb: Preprocessed images are kept in memory when all of them take at most so many MiB.
        workers: Threads that decode and preprocess images that are not kept.
    """

    steps: Count | None = None
    epochs: Positive | None = None
    batch_size: Count = 64
    learning_rate: Positive = 1e-3
    head_learning_rate: Positive | None = None
    projector_learning_rate: Positive | None = None
    schedule: Schedule = "cosine"
    warmup_ratio: Share = 0.05
    weight_decay: NotNegative = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    ema: Share = 0.0
    max_grad_norm: NotNegative = 1.0
    train_head: bool = False
    augment: Augment = "none"
    bf16: Bf16 = "auto"
    attention: Attention = "auto"
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False
    eval_every: Count | None = None
    save_every: Count | None = None
    log_every: Count = 10
    report_to: Trackers = ()
    seed: Seed = 0
    cache_mb: NotNegative = 512.0
    workers: Workers = 0

    def __post_init__(self) -> None:
        check_options(self)
        if self.steps is not None and self.epochs is not None:
            raise CordaError(
                f"give steps or epochs, one of the two (steps={self.steps}, epochs={self.epochs})"
            )
        if self.train_head and self.loss not in ("prompt", "auto"):
            raise CordaError(
                f"train_head belongs to the prompt loss, and this is the {self.loss} loss: "
                "a linear head is always trained, the contrastive loss has none"
            )

    def complete(self, format: str | None) -> TrainOptions:
        """With what is left open as it is meant for data of this format: the loss, and three epochs."""
        open_ended = self.steps is None and self.epochs is None
        epochs = _EPOCHS if open_ended else self.epochs
        return replace(self, loss=self.loss_for(format), epochs=epochs)


_EPOCHS = 3.0

RESUME_SAFE_OPTIONS = frozenset(
    {
        "eval_every",
        "save_every",
        "log_every",
        "report_to",
        "cache_mb",
        "workers",
        "gradient_checkpointing",
    }
)
"""Options that may differ between a training and its resumption, as they do not change the weights."""


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Attributes:
        history: entries as in `history.jsonl`: step, epoch, seconds, loss, learning_rate, grad_norm,
            samples_per_second, each further term of the loss by its name (without its weight, and no part of
            loss); and eval_loss, eval_accuracy on their own steps.
        steps: optimizer steps done.
        seconds: spent in training, over all its resumptions.
        samples_per_second: images (or pairs) trained on a second, in the last run of it.
        weights: the folder of the final weights: an adapter as PEFT saves it, else `trained.safetensors`.
        head: the trained classifier, if there is one.
        budget: what became of the forgetting budget, if there was one.
        resumed_from: the step this call resumed from; `steps` if it was finished already; None if it began.
    """

    history: list[dict[str, Any]]
    steps: int
    seconds: float
    samples_per_second: float
    weights: Path
    head: Head | None = None
    budget: Spent | None = None
    resumed_from: int | None = None

    @property
    def final_loss(self) -> float:
        """The last loss of the history, a mean over the steps since the entry before it."""
        return next(entry["loss"] for entry in reversed(self.history) if "loss" in entry)
