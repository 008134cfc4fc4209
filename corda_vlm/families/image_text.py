"""MetaCLIP 2, AIMv2, TIPSv2, Chinese-CLIP and AltCLIP of transformers, whole or one tower: see `architectures.image_text`.

They run as CLIP does. Texts count as their mask says; without one every token does, as the end of a text is not told by
the same id in all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from corda_vlm.families.architectures.image_text import IMAGE_TEXT
from corda_vlm.families.base import Batch, Contrastive, Family, Rule, class_of, unwrap
from corda_vlm.families.clip_hf import (
    canonical,
    encode_image,
    encode_text,
    forward,
    load,
    one_tower,
    towers,
)
from corda_vlm.families.loading.hub import reads

_PARTS = (
    "Model",
    *(f"{tower}Model{head}" for tower in ("Vision", "Text") for head in ("", "WithProjection")),
)
_CLASSES = {f"{name}{part}": kind for kind, (name, _) in IMAGE_TEXT.items() for part in _PARTS}


def _known(model: nn.Module) -> list[str]:
    return [kind for kind in class_of(model, "transformers") if kind in _CLASSES]


def rules(model: nn.Module) -> tuple[Rule, ...]:
    """The rules of a bare model."""
    return IMAGE_TEXT[_CLASSES[_known(model)[0]]][1]


def masks(batch: Batch) -> dict[str, Bool[Tensor, "b l"]]:
    """Text tokens that are no padding, where the batch says which are."""
    mask = batch.get("attention_mask")
    return {} if mask is None or batch.get("input_ids") is None else {"text": mask.bool()}


def logit_scale(model: nn.Module) -> Float[Tensor, ""]:
    """The scalar that multiplies cosine similarities: of TIPSv2 the inverse of its temperature, of AIMv2 at most its limit."""
    bare: Any = unwrap(model)
    if (temperature := getattr(bare, "temperature", None)) is not None:
        return (1 / temperature).reshape(())
    scale = getattr(bare, "logit_scale", None)
    if scale is None:
        raise one_tower(bare)
    limit = getattr(bare, "max_log_logit_scale", None)
    return (scale if limit is None else torch.clamp(scale, 0, limit)).exp().reshape(())


IMAGE_TEXT_HF = Family(
    name="image_text_hf",
    matches=lambda model: bool(_known(model)),
    rules=rules,
    forward=forward,
    masks=masks,
    contrastive=Contrastive(encode_image, encode_text, logit_scale),
    load=load,
    reads=reads(
        *(f"{kind}{part}" for kind in IMAGE_TEXT for part in ("", "_vision_model", "_text_model"))
    ),
    classes=tuple(f"{name}Model" for name, _ in IMAGE_TEXT.values()),
    canonical=canonical,
    towers=towers,
    model_types=tuple(IMAGE_TEXT),
)
