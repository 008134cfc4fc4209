"""What a model family declares. All knowledge of a family lives in its own file; the rest of the package
sees only these types.

`Rule` is the declared pattern; `corda_vlm.sites.Site` is the module it resolved to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""A batch as the models take it: `pixel_values` (B, 3, H, W), `input_ids` (B, L), `attention_mask` (B, L), …"""


@dataclass(frozen=True)
class Rule:
    """A declared pattern of weight matrices.

    Attributes:
        pattern: regular expression that matches the *whole* dotted path of the `nn.Linear`. A named group
            `block` gives the block's index; further named groups may be used in `stream`.
        tower: "vision", "text", "projector" or "language".
        role: "q", "k", "v", "o", "up", "gate", "down", "proj", or fused: "qkv", "kv", "gate_up".
        stream: format string over the named groups: sites whose formatted streams are equal read the same
            input tensor and share one covariance, e.g. `"{prefix}.attn.in"` for q, k and v.
    """

    pattern: str
    tower: str
    role: str
    stream: str


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
class Family:
    """How the models of one family are recognised, named, run and loaded.

    Attributes:
        name: key in `FAMILIES`, e.g. "clip_hf".
        matches: does this model belong to the family? Sees the bare model (never a PEFT wrapper).
        rules: the weight matrices, in the model's own order.
        forward: run one batch so that every tower the batch has inputs for is executed (for calibration).
        masks: batch -> tower -> (B, L) True on tokens that count, or no entry where every token counts.
        encode_image: (model, pixel_values (B, 3, H, W)) -> (B, D) embeddings, not normalised.
        encode_text: (model, batch with input_ids (n, L)) -> (n, D) embeddings, not normalised.
        logit_scale: model -> the scalar that multiplies cosine similarities (already exponentiated).
        load: (source, dtype) -> (model, processor); source is a folder, a built-in name or a hub id.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    rules: tuple[Rule, ...]
    forward: Callable[[nn.Module, Batch], object]
    masks: Callable[[Batch], Mapping[str, Bool[Tensor, "b l"]]]
    encode_image: Callable[[nn.Module, Tensor], Float[Tensor, "b d"]]
    encode_text: Callable[[nn.Module, Batch], Float[Tensor, "n d"]]
    logit_scale: Callable[[nn.Module], Float[Tensor, ""]]
    load: Callable[..., tuple[nn.Module, Processor]]
