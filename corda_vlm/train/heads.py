"""Classifiers on image features: prompts of class names, or a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.evaluation.class_names import DEFAULT_TEMPLATES as DEFAULT_TEMPLATES
from corda_vlm.families.base import Contrastive, Processor
from corda_vlm.tensors import load_tensors, read_header, save_tensors

Template = str | Callable[[str], str]
"""A prompt with `{}` where the class name goes, or a function of the name, as in open_clip's lists."""

KINDS = ("prompt", "linear")
_FORMAT = "corda_vlm.head"


class Head(nn.Module):
    """A trained classifier: features -> logits.

    Attributes:
        kind: "prompt": scaled cosines, without a bias; "linear": W·(√D · f/‖f‖) + b.
        weight: (classes, D).
        bias: (classes,), zero and unused for "prompt".
        logit_scale: (), unused for "linear".
        start: (classes, D) the class vectors before training, which are the zero-shot classifier; None for "linear",
            which starts from zero, and for heads of files that do not hold them.
    """

    def __init__(self, kind: str, weight: Tensor, logit_scale: float = 1.0) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(weight.detach().clone().float())
        self.bias = nn.Parameter(
            weight.new_zeros(len(weight)).float(), requires_grad=kind == "linear"
        )
        self.logit_scale: Tensor
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale), device=weight.device))
        self.start: Tensor | None
        start = weight.detach().clone().float() if kind == "prompt" else None
        self.register_buffer("start", start, persistent=False)  # no part of what is trained

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b classes"]:
        """Logits of image features, normalized or not.

        Raises:
            CordaError: the features are of another width than the head's.
        """
        if features.shape[-1] != self.weight.shape[1]:
            raise CordaError(
                f"this head is for image embeddings {self.weight.shape[1]} wide, and the model's are {features.shape[-1]}: it "
                "belongs to another model"
            )
        if self.kind == "prompt":
            return prompt_logits(features, self.weight, self.logit_scale)
        unit = F.normalize(features.float(), dim=-1)
        # Entries of size about one, so that a rate suits every width.
        return F.linear(unit * unit.shape[-1] ** 0.5, self.weight, self.bias)

    def at_scale(self, scale: float) -> Head:
        """A head whose class vectors are `start + scale · (trained − start)`: 0 is zero-shot, 1 this head.

        Raises:
            CordaError: no class vectors from before training, so that no zero-shot head is at the other end.
        """
        if scale == 1.0:
            return self
        if self.start is None:
            raise CordaError(
                f"a {self.kind} head cannot be scaled: it has no counterpart in the model before training. Use "
                "--scales with prompts, or with class vectors that start there (train_head)"
                if self.kind == "linear"
                else "this head was saved without its class vectors from before training; train it again to scale it"
            )
        head = Head(self.kind, self.start, float(self.logit_scale))
        with torch.no_grad():
            head.weight.lerp_(self.weight, scale)
        return head

    def save(self, path: str | Path) -> None:
        """Write the head as safetensors, atomically.

        Raises:
            CordaError: it holds NaN or Inf, or nothing can be written there.
        """
        tensors = self.state_dict() | ({} if self.start is None else {"start": self.start})
        save_tensors(path, tensors, {"format": _FORMAT, "kind": self.kind})

    @classmethod
    def load(cls, path: str | Path) -> Head:
        """Read a head.

        Raises:
            ForeignFileError: the file is missing, damaged, or no head.
        """
        remedy = "train it again, or do without it: delete the file"
        _, metadata = read_header(path, "head of a classifier", remedy)
        if metadata.get("format") != _FORMAT:
            raise ForeignFileError(f"{path} is a safetensors file, but no head of this package")
        tensors = load_tensors(path, "head of a classifier", remedy)
        weight, kind = tensors.get("weight"), metadata.get("kind")
        if kind not in KINDS or weight is None or weight.ndim != 2 or 0 in weight.shape:
            shape = None if weight is None else tuple(weight.shape)
            raise ForeignFileError(
                f"{path} is no whole head: of kind {kind!r} with a weight of shape {shape}, where one of "
                f"{', '.join(KINDS)} with (classes, width) was expected; {remedy}"
            )
        head = cls(kind, weight)
        wanted = {name: value.shape for name, value in head.state_dict().items()}
        if "start" in tensors:
            wanted["start"] = weight.shape
        found = {name: value.shape for name, value in tensors.items()}
        if wanted != found or not all(value.is_floating_point() for value in tensors.values()):
            strange = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
            raise ForeignFileError(
                f"{path} is no whole head: {', '.join(strange)[:200] or 'a tensor of whole numbers'} does not fit a weight of "
                f"shape {tuple(weight.shape)}; {remedy}"
            )
        start = tensors.pop("start", None)
        head.load_state_dict(tensors)
        head.start = None if start is None else start.float()
        return head


def prompt_logits(
    features: Float[Tensor, "b d"], prompts: Float[Tensor, "classes d"], scale: Float[Tensor, ""]
) -> Float[Tensor, "b classes"]:
    """Scaled cosines of image features to class vectors, in float32."""
    cosines = F.normalize(features.float(), dim=-1) @ F.normalize(prompts.float(), dim=-1).T
    return scale.float() * cosines


class Prompts:
    """The prompts of all classes, tokenized once.

    Raises:
        CordaError: no class or no template, or a template without `{}`.
    """

    def __init__(
        self,
        processor: Processor,
        classes: Sequence[str],
        templates: Sequence[Template] | None,
        device: torch.device,
    ) -> None:
        templates = DEFAULT_TEMPLATES if templates is None else templates
        if not classes or not templates:
            raise CordaError(
                f"{len(classes)} classes and {len(templates)} templates: both are needed"
            )
        self.templates = len(templates)
        tokens = processor.text([_filled(t, name) for name in classes for t in templates])
        self.tokens = {name: tensor.to(device) for name, tensor in tokens.items()}

    def features(
        self, contrastive: Contrastive, model: nn.Module, chunk: int | None = None
    ) -> Float[Tensor, "classes d"]:
        """Class vectors: the mean of the unit vectors of a class's prompts, made a unit vector again.

        `chunk` prompts are encoded at a time; None encodes all at once.
        """
        count = len(next(iter(self.tokens.values())))
        step = count if chunk is None else chunk
        pieces = [
            contrastive.encode_text(
                model, {name: tensor[start : start + step] for name, tensor in self.tokens.items()}
            )
            for start in range(0, count, step)
        ]
        unit = F.normalize(torch.cat(pieces).float(), dim=-1)  # (classes * templates, D)
        return F.normalize(unit.unflatten(0, (-1, self.templates)).mean(1), dim=-1)

    def trained_with(self, contrastive: Contrastive, model: nn.Module) -> bool:
        """Do the class vectors change in training? True if a gradient flows from them to the model."""
        with torch.enable_grad():
            one = contrastive.encode_text(
                model, {name: tensor[:1] for name, tensor in self.tokens.items()}
            )
        return one.requires_grad


def _filled(template: Template, name: str) -> str:
    if callable(template):
        return template(name)
    if "{}" not in template:
        raise CordaError(f"the template {template!r} has no {{}} for the class name")
    return template.replace("{}", name)
