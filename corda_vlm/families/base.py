"""What a model family declares. All knowledge of a family lives in its own file; the rest of the package
sees only these types.

`Rule` is the declared pattern; `corda_vlm.sites.Site` is the module it resolved to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from corda_vlm.errors import CordaError, DataError, UnknownNameError
from corda_vlm.families.options import TOKENS

Batch = Mapping[str, Any]
"""A batch as the models take it: `pixel_values` (B, 3, H, W), `input_ids` (B, L), `attention_mask` (B, L), …

Models that generate text take the images of all records one after another, as their transformers processor gives
them, with what belongs to them (`image_sizes`, `image_grid_thw`, …), and `labels` (B, L), -100 outside the responses.
"""

Masking = Callable[[Batch], Mapping[str, Bool[Tensor, "b l"]]]
"""batch -> tower -> (B, L) True on tokens that count, or no entry where every token counts.

An entry may also be named as a stream, whose inputs it is then the mask of, instead of that of their tower.
"""


@dataclass(frozen=True)
class Rule:
    """A declared pattern of weight matrices.

    Attributes:
        pattern: regular expression that matches the *whole* dotted path of the layer (as the family's
            `canonical` writes it). A named group `block` gives the block's index; further named groups may be
            used in `stream`.
        tower: "vision", "text", "projector" or "language".
        role: "q", "k", "v", "o", "up", "gate", "down", "proj", "conv", or fused: "qkv", "kv", "gate_up"; "router".
        stream: format string over the named groups: sites whose formatted streams are equal read the same
            input tensor and share one covariance, e.g. `"{prefix}.attn.in"` for q, k and v.
        only: "conv" for convolutions alone; None for any layer.
        pool: format string over the named groups, of experts: those whose formatted pools are equal stand in for one another
            where one of them saw too few tokens.
    """

    pattern: str
    tower: str
    role: str
    stream: str
    only: Literal["conv"] | None = None
    pool: str | None = None


@dataclass(frozen=True)
class Processor:
    """Turns images and texts into a model's inputs.

    Attributes:
        image: PIL image -> `pixel_values` of one image (3, H, W), float32, as the model was trained to see it.
        text: list of n strings -> {"input_ids": (n, L), "attention_mask": (n, L)}; the mask is True on
            tokens and False on padding.
        image_size: height and width in pixels.
    """

    image: Callable[[Any], Float[Tensor, "3 h w"]]
    text: Callable[[Sequence[str]], dict[str, Tensor]]
    image_size: tuple[int, int]


@dataclass(frozen=True)
class Contrastive:
    """What a family of models that compare images with texts adds to its `Family`.

    Attributes:
        encode_image: (model, pixel_values (B, 3, H, W) or a batch) -> (B, D) embeddings, not normalized.
        encode_text: (model, batch with input_ids (n, L)) -> (n, D) embeddings, not normalized.
        logit_scale: model -> the scalar that multiplies cosine similarities (already exponentiated).
    """

    encode_image: Callable[..., Float[Tensor, "b d"]]
    encode_text: Callable[[nn.Module, Batch], Float[Tensor, "n d"]]
    logit_scale: Callable[[nn.Module], Float[Tensor, ""]]


@dataclass(frozen=True)
class Generative:
    """What a family of models that generate text adds to its `Family`. Its `load` takes a `device_map` as well.

    Attributes:
        choose_tokens: (model, tokens) -> the masks of the tokens that count, `tokens` being one of `TOKENS`.
        projector: model -> the dotted paths (canonical) of what leads from its vision tower to its language model.
    """

    choose_tokens: Callable[[nn.Module, str], Masking]
    projector: Callable[[nn.Module], tuple[str, ...]] = lambda model: ()


def call(model: nn.Module, batch: Batch) -> object:
    """Run a model on all that a batch holds, by name."""
    return model(**batch)


def pictures_and_texts(model: nn.Module, batch: object) -> object:
    """A batch as a plain DataLoader gives it, as a mapping: of a tensor, or a tuple or list of them.

    A tensor (B, 3, H, W) of real numbers is pictures, one (B, L) of whole numbers the tokens of texts, and a mapping is taken as
    it is. Labels (B,) are left out.
    """
    items = [batch] if isinstance(batch, Tensor) else batch
    if not isinstance(items, (tuple, list)):
        return batch
    made: dict[str, Any] = {}
    for item in items:
        if isinstance(item, Mapping):
            made.update(item)
        elif isinstance(item, Tensor) and item.ndim == 4 and item.is_floating_point():
            made.setdefault("pixel_values", item)
        elif isinstance(item, Tensor) and item.ndim == 2 and not item.is_floating_point():
            made.setdefault("input_ids", item)
    return made or batch


def token_ids(model: nn.Module, batch: object) -> object:
    """A batch (B, L) of whole numbers alone, also in a list of its own, as a mapping.

    What a second tensor is, a mask or labels, is not to be seen: such a batch has to be a mapping, and stays as it is.
    """
    alone = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else batch
    whole = isinstance(alone, Tensor) and alone.ndim == 2 and not alone.is_floating_point()
    return {"input_ids": alone} if whole else batch


@dataclass(frozen=True)
class Family:
    """How the models of one family are recognized, named, run and loaded.

    Every function takes the bare model or a PEFT wrapper around it, packed or with unpacked attention. Three fields
    are enough to adapt a model that was loaded elsewhere:

        Family("mine", matches=lambda model: isinstance(model, Mine), rules=block_rules(...))

    Attributes:
        name: key in `FAMILIES`, e.g. "clip_hf".
        matches: does this model belong to the family? Sees the bare model (never a PEFT wrapper).
        rules: the weight matrices, in the model's own order; or model -> those, where they depend on what it is made of.
        forward: run one batch so that every tower the batch has inputs for is executed (for calibration).
        masks: batch -> tower -> (B, L) True on tokens that count, or no entry where every token counts. Families
            that generate text choose their tokens instead.
        contrastive: of models that compare images with texts, else None.
        generative: of models that generate text, else None.
        load: (source, dtype) -> (model, processor); source is a folder or an id on a hub. None where
            `load_model` is not for this family.
        reads: does this folder hold a model of the family? Looks at file names and configs, never at weights.
        classes: the names of the model classes, for messages.
        canonical: (model, dotted path) -> the path under which the rules know it. A family whose classes name
            one layer differently (transformers 4 and 5; a tower alone or in the whole model) maps it here.
        towers: model -> the towers it has; each must have a site, or be left out by name. Empty: those that have sites.
        refuses: model -> why its layers cannot be adapted although the class matches, or None.
        model_types: the `model_type`s of the configurations on a hub that the family's `load` takes.
        as_mapping: (model, a batch as users have it) -> the mapping that `forward` and `masks` take.
        loose_towers: towers whose mask is that of some layers alone; of inputs that it does not fit every row counts.
        save: (bare model, folder, source) -> how a program loads it again. For models that transformers does not save;
            None: the weights alone are written.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    rules: tuple[Rule, ...] | Callable[[nn.Module], tuple[Rule, ...]]
    forward: Callable[[nn.Module, Batch], object] = call
    masks: Masking = lambda batch: {}
    contrastive: Contrastive | None = None
    generative: Generative | None = None
    load: Callable[..., tuple[nn.Module, Processor]] | None = None
    reads: Callable[[Path], bool] = lambda folder: False
    classes: tuple[str, ...] = ()
    canonical: Callable[[nn.Module, str], str] = lambda model, name: name
    towers: Callable[[nn.Module], tuple[str, ...]] = lambda model: ()
    refuses: Callable[[nn.Module], str | None] = lambda model: None
    model_types: tuple[str, ...] = ()
    as_mapping: Callable[[nn.Module, Any], Any] = lambda model, batch: batch
    loose_towers: tuple[str, ...] = ()
    save: Callable[[nn.Module, Path, str | Path | None], str] | None = None

    def rules_of(self, model: nn.Module) -> tuple[Rule, ...]:
        """The rules of a bare model."""
        return self.rules(model) if callable(self.rules) else self.rules

    def need_contrastive(self, model: nn.Module) -> Contrastive:
        """What compares images with texts.

        Raises:
            CordaError: models of this family have no embeddings.
        """
        if self.contrastive is None:
            raise CordaError(self._lacks(model, "contrastive"))
        return self.contrastive

    def need_generative(self, model: nn.Module) -> Generative:
        """What generates text.

        Raises:
            CordaError: models of this family generate none.
        """
        if self.generative is None:
            raise CordaError(self._lacks(model, "generative"))
        return self.generative

    def _lacks(self, model: nn.Module, part: str) -> str:
        """The one place that says what a family is not for, and what is."""
        kind = type(unwrap(model)).__name__
        if part == "contrastive" and self.generative is not None:
            return (
                f"{kind} generates text and has no embeddings to compare; zero-shot classification and retrieval are "
                "for CLIP models, questions, likelihood and perplexity for this one"
            )
        if part == "generative" and self.contrastive is not None:
            return (
                f"{kind} compares images with texts and generates none: measure it on zero_shot or retrieval tasks, "
                "and train it with the prompt, linear or contrastive loss"
            )
        return f"the family {self.name!r} of {kind} declares nothing {part}; give its Family {part}={part.title()}(...)"


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, with what feeds it.

    Attributes:
        model: in eval mode, on the device and in the dtype asked for.
        source: the name or path it was loaded from.
    """

    model: nn.Module
    processor: Processor
    family: Family
    source: str


# ------------------------------------------------------------------ shared by the families


Layers = tuple[tuple[str, str, str], ...]
"""(path in a block, role, stream in the block) of each weight matrix; a stream that begins with / is of the whole model."""


def block_rules(path: str, tower: str, layers: Iterable[tuple[str, str, str]]) -> tuple[Rule, ...]:
    """The rules of the blocks `<path>.<n>` of a tower.

    Args:
        path: regular expression of the dotted path of the list of blocks, e.g. `r"model\\.layers"`.
        layers: for each weight matrix of a block its path in it ("self_attn.q_proj"), its role ("q"), and its stream
            within the block ("attn.in").
    """
    return part_rules(rf"{path}\.(?P<block>\d+)", tower, layers)


def part_rules(path: str, tower: str, layers: Iterable[tuple[str, str, str]]) -> tuple[Rule, ...]:
    """The rules of the part `<path>` of a tower, e.g. its pooling head; `layers` as of `block_rules`."""
    return tuple(
        Rule(
            rf"(?P<prefix>{path})\.{re.escape(layer)}",
            tower,
            role,
            stream[1:] if stream.startswith("/") else f"{{prefix}}.{stream}",
        )
        for layer, role, stream in layers
    )


def token_masks(family: Family, model: nn.Module, tokens: str = "all") -> Masking:
    """Which tokens feed a covariance: a function from a batch to the masks of its towers. Padding never does.

    Args:
        tokens: of language models "all", "prompt" (before and between the responses), "response" (what `labels`
            names), "image" (the places of image features) or "text" (all others). Vision towers and projectors
            see all patches in each case. Families without a language model know "all" only.

    Raises:
        UnknownNameError: no such choice.
        CordaError: the family has no choice.
    """
    if tokens not in TOKENS:
        raise UnknownNameError("choice of tokens", tokens, TOKENS)
    if family.generative is not None:
        return family.generative.choose_tokens(model, tokens)
    if tokens != "all":
        raise CordaError(
            f"tokens={tokens!r} is for models that generate text; {type(model).__name__} ({family.name}) has no prompt, "
            "response or image tokens. Leave it out."
        )
    return family.masks


def unwrap(model: nn.Module) -> Any:
    """The model inside a PEFT wrapper (its layers keep their adapters), or the model itself.

    Typed `Any`: what attributes it has is its family's knowledge.
    """
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def class_of(model: nn.Module, package: str) -> frozenset[str]:
    """Names of the classes of `model` (bases included) that `package` defines.

    By name, so that a family can be asked about a model without importing the family's library.
    """
    return frozenset(
        kind.__name__ for kind in type(model).__mro__ if kind.__module__.split(".")[0] == package
    )


def token_mask(batch: Batch) -> Bool[Tensor, "b l"] | None:
    """Which text tokens count: the batch's own mask, else all up to and including the end-of-text token.

    Without a mask the end of text is taken to be the first occurrence of the row's highest id, as CLIP's
    pooling does.
    """
    ids = batch.get("input_ids")
    if ids is None:
        return None
    if (given := batch.get("attention_mask")) is not None:
        return given.bool()
    end = ids.argmax(dim=-1, keepdim=True)  # (B, 1)
    return torch.arange(ids.shape[-1], device=ids.device) <= end  # (B, L)


def run_towers(
    model: nn.Module,
    batch: Batch,
    *,
    vision: Callable[[], object] | None,
    text: Callable[[], object] | None,
) -> dict[str, object]:
    """Run the towers that the model has and the batch feeds.

    Raises:
        DataError: the batch feeds none of them.
    """
    inputs = {"vision": ("pixel_values", vision), "text": ("input_ids", text)}
    outputs = {
        tower: run()
        for tower, (key, run) in inputs.items()
        if run is not None and batch.get(key) is not None
    }
    if not outputs:
        wanted = " or ".join(repr(key) for key, run in inputs.values() if run is not None)
        raise DataError(
            f"{type(model).__name__} takes {wanted}; the batch has: {', '.join(batch) or 'nothing'}"
        )
    return outputs


def no_tower(model: nn.Module, tower: str) -> CordaError:
    """The error for a model that is asked to run a tower it does not have."""
    return CordaError(f"{type(model).__name__} has no {tower} tower")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs have to be: the device of its first parameter; the CPU for one without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device; itself if it is there."""
    if all(value.device == device for value in batch.values() if isinstance(value, Tensor)):
        return batch
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


@contextmanager
def requiring(model: nn.Module, weights: Iterable[Tensor] = ()) -> Iterator[None]:
    """Of a model's parameters only these require gradients; what each did is put back, after an exception too."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Batch normalizations of which nothing is trained. In training mode each would move its running statistics all the same,
    and normalize by those of the batch: the frozen model would not stay as it is."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and the like off; every module's own mode is put back, after an exception too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
