"""What a training minimizes: the loss of one batch, and whatever it trains besides the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.data import Records
from corda_vlm.errors import CordaError, DataError
from corda_vlm.families.base import Batch, Contrastive, Family, Processor, evaluating, unwrap
from corda_vlm.train.heads import Head, Prompts, Template, prompt_logits
from corda_vlm.train.losses import capped, contrastive_logits, contrastive_loss
from corda_vlm.train.next_token import NextTokenObjective, make_next_token
from corda_vlm.train.options import Loss, TrainOptions


@runtime_checkable
class Objective(Protocol):
    """A loss over batches.

    Attributes:
        towers: what a batch must hold, "vision" and "text", or "language" for conversations.
        head: the trained classifier, or None.
    """

    towers: tuple[str, ...]
    head: Head | None

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss () and, for each record, whether the highest logit was the right one (B,)."""
        ...


@dataclass
class PromptObjective:
    """Cross-entropy of scaled cosines between image features and class prompts.

    The class vectors are computed once where nothing trained reaches them, trained themselves where there
    is a `head`, and else computed with gradients in every step.
    """

    contrastive: Contrastive
    prompts: Prompts
    frozen: Tensor | None
    head: Head | None
    label_smoothing: float
    towers: tuple[str, ...] = ("vision",)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.logits(model, batch)
        with torch.autocast(logits.device.type, enabled=False):
            if self.head is not None:
                scale = self.contrastive.logit_scale(model).detach().float()
                self.head.logit_scale.copy_(scale.clamp(max=100.0))
            return _classified(logits, batch["labels"], self.label_smoothing)

    def logits(self, model: nn.Module, batch: Batch) -> Float[Tensor, "b classes"]:
        """Scaled cosines of the images to the classes."""
        images = self.contrastive.encode_image(model, batch["pixel_values"])  # (B, D)
        if self.head is not None:
            classes = self.head.weight
        elif self.frozen is not None:
            classes = self.frozen
        else:
            classes = self.prompts.features(self.contrastive, model)  # (classes, D)
        with torch.autocast(images.device.type, enabled=False):
            scale = self.contrastive.logit_scale(model).float()
            return prompt_logits(images, classes, capped(scale))


@dataclass
class LinearObjective:
    """Cross-entropy of a linear classifier on image features."""

    contrastive: Contrastive
    head: Head | None
    label_smoothing: float
    towers: tuple[str, ...] = ("vision",)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        images = self.contrastive.encode_image(model, batch["pixel_values"])  # (B, D)
        assert self.head is not None
        with torch.autocast(images.device.type, enabled=False):
            return _classified(self.head(images), batch["labels"], self.label_smoothing)


@dataclass
class ContrastiveObjective:
    """CLIP's symmetric loss over the pairs of a batch; right means that an image's own text came first."""

    contrastive: Contrastive
    mask_duplicates: bool
    label_smoothing: float
    head: Head | None = None
    towers: tuple[str, ...] = ("vision", "text")

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        images = self.contrastive.encode_image(model, batch["pixel_values"])  # (B, D)
        texts = self.contrastive.encode_text(model, batch)  # (B, D)
        with torch.autocast(images.device.type, enabled=False):
            scale = capped(self.contrastive.logit_scale(model).float())
            ids = batch["input_ids"] if self.mask_duplicates else None
            loss = contrastive_loss(
                images, texts, scale, text_ids=ids, label_smoothing=self.label_smoothing
            )
            best = contrastive_logits(images, texts, scale).detach().argmax(-1)
            # A duplicate of the own text counts as the own text.
            right = (batch["input_ids"][best] == batch["input_ids"]).all(-1)
            return loss, right


def towers_of(loss: Loss) -> tuple[str, ...]:
    """What a batch must hold for a loss, which is settled."""
    kinds = {"contrastive": ContrastiveObjective, "next_token": NextTokenObjective}
    return kinds.get(loss, PromptObjective).towers


def make_objective(
    options: TrainOptions,
    model: nn.Module,
    family: Family,
    processor: Processor,
    data: Records,
    classes: Sequence[str] | None,
    templates: Sequence[Template] | None,
) -> Objective:
    """The objective that `options.loss` names, on the model's device.

    Raises:
        DataError: the data has no labels, no texts, or labels beyond the classes.
        CordaError: prompts that cannot be built.
    """
    smoothing = options.label_smoothing
    if options.loss == "next_token":
        return make_next_token(options, family, data)
    if options.loss == "contrastive":
        if data.texts is None:
            raise DataError(
                f"{data.spec}: the contrastive loss needs a text for each image; name the column with text:, "
                "or make one of the label with text: 'a photo of a {class_name}'"
            )
        if options.batch_size < 2:
            raise CordaError(
                "the contrastive loss compares the pairs of a batch: batch_size must be above 1"
            )
        parts = family.need_contrastive(model)
        return ContrastiveObjective(parts, options.mask_duplicates, smoothing)

    if data.conversational:
        raise DataError(
            f"{data.spec}: holds conversations, and the {options.loss} loss is for images with labels; choose loss "
            "next_token"
        )
    names = _class_names(data, classes, options.loss)
    contrastive = family.need_contrastive(model)
    bare, device = unwrap(model), next(model.parameters()).device
    with (
        evaluating(bare),
        torch.no_grad(),
    ):  # class vectors are the ones that an evaluation would use
        if options.loss == "linear":
            one = torch.zeros(1, 3, *processor.image_size, device=device)
            width = contrastive.encode_image(bare, one).shape[-1]
            return LinearObjective(
                contrastive,
                Head("linear", torch.zeros(len(names), width, device=device)),
                smoothing,
            )
        prompts = Prompts(processor, names, templates, device)
        if not options.train_head and prompts.trained_with(contrastive, bare):
            return PromptObjective(contrastive, prompts, None, None, smoothing)
        start = prompts.features(contrastive, bare, chunk=256)
        head = (
            Head("prompt", start, float(contrastive.logit_scale(bare)))
            if options.train_head
            else None
        )
        return PromptObjective(contrastive, prompts, start, head, smoothing)


def _class_names(data: Records, classes: Sequence[str] | None, loss: str) -> Sequence[str]:
    names = data.class_names if classes is None else classes
    if data.labels is None or names is None:
        raise DataError(f"{data.spec}: the {loss} loss needs labels; name their column with label:")
    if max(data.labels) >= len(names):
        raise DataError(
            f"{data.spec}: has label {max(data.labels)}, but there are {len(names)} class names; "
            "name every class of the data"
        )
    return names


def _classified(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    return loss, logits.detach().argmax(-1) == labels
