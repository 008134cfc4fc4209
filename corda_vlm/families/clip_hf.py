"""CLIP, SigLIP and SigLIP 2 of transformers: whole models, and towers alone with or without a projection.

transformers 4 and 5 name the layers of a tower class differently: `CLIPVisionModel` has
`vision_model.encoder.layers.0…` in 4 and `encoder.layers.0…` in 5, while `CLIPModel` keeps the prefix. The
rules are written with the prefix; `canonical` adds it where it is missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from corda_vlm.errors import CordaError
from corda_vlm.families.base import (
    Batch,
    Contrastive,
    Family,
    Layers,
    Processor,
    Rule,
    block_rules,
    class_of,
    no_tower,
    part_rules,
    pictures_and_texts,
    run_towers,
    token_mask,
    unwrap,
)
from corda_vlm.families.loading.hub import (
    Missing,
    config_from,
    how_to_read,
    image_size,
    or_missing,
    reads,
    tokenizer_of,
)
from corda_vlm.families.loading.trust import trusted

_CLIP = (
    "CLIPModel",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
)
_SIGLIP = tuple(
    f"{name}{part}"
    for name in ("Siglip", "Siglip2")
    for part in ("Model", "VisionModel", "TextModel")
)


# ------------------------------------------------------------------ rules


_MLP: Layers = (("mlp.fc1", "up", "mlp.in"), ("mlp.fc2", "down", "mlp.mid"))
_BLOCK: Layers = (
    *((f"self_attn.{role}_proj", role, "attn.in") for role in ("q", "k", "v")),
    ("self_attn.out_proj", "o", "attn.out"),
    *_MLP,
)
# The pooling head attends from one learned probe to the tokens: q reads the probe, k and v read the tokens.
_HEAD: Layers = (
    ("attention.q_proj", "q", "attn.probe"),
    ("attention.k_proj", "k", "attn.in"),
    ("attention.v_proj", "v", "attn.in"),
    ("attention.out_proj", "o", "attn.out"),
    *_MLP,
)
_TEXT = block_rules(r"text_model\.encoder\.layers", "text", _BLOCK)
_VISION = block_rules(r"vision_model\.encoder\.layers", "vision", _BLOCK)

_CLIP_RULES = (
    *_TEXT,
    *_VISION,
    Rule(r"visual_projection", "vision", "proj", "visual_projection.in"),
    Rule(r"text_projection", "text", "proj", "text_projection.in"),
)

_SIGLIP_RULES = (
    *_TEXT,
    Rule(r"text_model\.head", "text", "proj", "text_model.head.in"),
    *_VISION,
    *part_rules(r"vision_model\.head", "vision", _HEAD),
)


def canonical(model: nn.Module, name: str) -> str:
    """The path of a layer as the rules write it: a tower class alone gets its tower's prefix."""
    kinds = class_of(model, "transformers")
    for part, prefix in (("VisionModel", "vision_model."), ("TextModel", "text_model.")):
        if any(kind.endswith(part) for kind in kinds) and not name.startswith(prefix):
            return prefix + name
    return name


# ------------------------------------------------------------------ running


def _pooled(output: Any) -> Tensor:
    """(B, D) embeddings: transformers 4 returns the tensor, 5 an output object that holds it."""
    if isinstance(output, Tensor):
        return output
    for field in ("image_embeds", "text_embeds", "pooler_output"):
        if (value := getattr(output, field, None)) is not None:
            return value
    raise CordaError(
        f"{type(output).__name__} holds no pooled embeddings; does the model have its head?"
    )


def _has(model: nn.Module, tower: str) -> bool:
    kinds = class_of(model, "transformers")
    other = {"vision": "TextModel", "text": "VisionModel"}[tower]
    return not any(other in kind for kind in kinds)


def towers(model: nn.Module) -> tuple[str, ...]:
    return tuple(tower for tower in ("vision", "text") if _has(model, tower))


def _run(model: nn.Module, tower: str, inputs: dict[str, Tensor]) -> Tensor:
    bare = unwrap(model)
    if not _has(bare, tower):
        raise no_tower(bare, tower)
    features = {"vision": "get_image_features", "text": "get_text_features"}[tower]
    return _pooled(getattr(bare, features, bare)(**inputs))


def _image_inputs(model: Any, pixels: Tensor | Batch) -> dict[str, Tensor]:
    """The vision tower's arguments. SigLIP 2 (NaFlex) takes patches, their mask and grid; whole images of one
    size are cut into patches here, in the order of its image processor: rows, columns, then (height, width, channel).
    """
    if isinstance(pixels, Tensor):
        pixels = {"pixel_values": pixels}
    inputs = {
        key: pixels[key]
        for key in ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        if pixels.get(key) is not None
    }
    images = inputs["pixel_values"]
    if not _takes_patches(model) or images.dim() == 3:
        return inputs
    config = getattr(model.config, "vision_config", model.config)
    size: int = config.patch_size
    rows, columns = images.shape[-2] // size, images.shape[-1] // size
    if (rows * size, columns * size) != tuple(images.shape[-2:]):
        raise CordaError(
            f"images of {images.shape[-2]}×{images.shape[-1]} pixels are not made of {size}×{size} patches"
        )
    patches = images.unflatten(-2, (rows, size)).unflatten(
        -1, (columns, size)
    )  # (B, 3, R, P, C, P)
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, R·C, P·P·3)
    grid = torch.tensor([[rows, columns]] * len(images), device=images.device)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(
            patches.shape[:2], dtype=torch.long, device=images.device
        ),
        "spatial_shapes": grid,
    }


def _takes_patches(model: nn.Module) -> bool:
    return bool(class_of(model, "transformers") & {"Siglip2Model", "Siglip2VisionModel"})


def encode_image(model: nn.Module, pixels: Tensor | Batch) -> Float[Tensor, "b d"]:
    """Image embeddings (B, D), not normalized, from `pixel_values` (B, 3, H, W) or a whole batch."""
    return _run(model, "vision", _image_inputs(unwrap(model), pixels))


def encode_text(model: nn.Module, batch: Batch) -> Float[Tensor, "n d"]:
    """CLIP's text embeddings (n, D), not normalized."""
    inputs = {
        key: batch[key] for key in ("input_ids", "attention_mask") if batch.get(key) is not None
    }
    return _run(model, "text", inputs)


def _encode_text_siglip(model: nn.Module, batch: Batch) -> Float[Tensor, "n d"]:
    # SigLIP was trained without a text mask: padding is attended to and the last position is pooled.
    return _run(model, "text", {"input_ids": batch["input_ids"]})


def forward(model: nn.Module, batch: Batch) -> object:
    """Run every tower that the model has and the batch feeds."""
    return _forward(model, batch, encode_text)


def _forward_siglip(model: nn.Module, batch: Batch) -> object:
    return _forward(model, batch, _encode_text_siglip)


def _forward(model: nn.Module, batch: Batch, text: Any) -> object:
    bare = unwrap(model)
    return run_towers(
        bare,
        batch,
        vision=(lambda: encode_image(bare, batch)) if _has(bare, "vision") else None,
        text=(lambda: text(bare, batch)) if _has(bare, "text") else None,
    )


def masks(batch: Batch) -> dict[str, Bool[Tensor, "b l"]]:
    """Text tokens up to and including the end of text; with NaFlex inputs, the patches that are no padding."""
    found = {"text": token_mask(batch), "vision": batch.get("pixel_attention_mask")}
    return {tower: mask.bool() for tower, mask in found.items() if mask is not None}


def _masks_siglip(batch: Batch) -> dict[str, Bool[Tensor, "b l"]]:
    """As for CLIP, and the last position too: it is the one the text embedding is read from."""
    found = masks({**batch, "input_ids": None})
    if batch.get("input_ids") is not None:
        given = batch.get("attention_mask")
        mask = torch.ones_like(batch["input_ids"]) if given is None else given
        mask = mask.bool().clone()
        mask[:, -1] = True
        found["text"] = mask
    return found


def logit_scale(model: nn.Module) -> Float[Tensor, ""]:
    """The scalar that multiplies cosine similarities, exponentiated."""
    bare = unwrap(model)
    if not hasattr(bare, "logit_scale"):
        raise one_tower(bare)
    return bare.logit_scale.exp().reshape(())


def one_tower(bare: nn.Module) -> CordaError:
    """The error for a tower that is asked for its scale."""
    return CordaError(f"{type(bare).__name__} is one tower alone and has no logit scale")


# ------------------------------------------------------------------ loading


# Of BERTs, which could read longer texts (and RoBERTas two tokens fewer than their positions), as many tokens as CLIP reads.
_CONTEXT = 77
_OWN = re.compile(r"\w+(?:Vision|Text)Model(?:WithProjection)?")


def load(source: str | Path, dtype: torch.dtype) -> tuple[nn.Module, Processor]:
    """The model in a folder or on a hub, whole or one tower, and what feeds it."""
    import transformers

    named = getattr(config_from(source), "architectures", None) or ()
    # A tower alone as its own class, which may have a projection; other classes hold a whole model, or a part of one.
    own = next((name for name in named if _OWN.fullmatch(name)), "AutoModel")
    kind = getattr(transformers, own, transformers.AutoModel)
    model = kind.from_pretrained(source, **how_to_read(source)).to(dtype).eval()
    return model, processor(source, model)


def processor(source: str | Path, model: nn.Module) -> Processor:
    """The image processor and tokenizer that lie beside the weights, under our interface.

    What is not there is an error only when it is used: a model can be adapted without them.
    """
    import transformers

    # PIL resizes as images were resized when these models were trained; tensors come out a little different.
    old = int(transformers.__version__.split(".")[0]) < 5
    backend: dict[str, Any] = {"use_fast": False} if old else {"backend": "pil"}
    images = or_missing(
        lambda: transformers.AutoImageProcessor.from_pretrained(
            source, trust_remote_code=trusted(), **backend
        )
    )
    words = or_missing(lambda: tokenizer_of(source, transformers))
    return make_processor(
        model, images if _has(model, "vision") else None, words if _has(model, "text") else None
    )


def make_processor(model: nn.Module, images: Any, words: Any) -> Processor:
    """A `Processor` from a transformers image processor and tokenizer, None where the model lacks the tower."""
    bare = unwrap(model)
    config = bare.config
    of_text = getattr(config, "text_config", config)
    length = getattr(of_text, "max_position_embeddings", None)
    if length is not None and hasattr(of_text, "type_vocab_size"):
        length = min(length, _CONTEXT)
    size = image_size(getattr(config, "vision_config", config))

    def image(picture: Any) -> Float[Tensor, "3 h w"]:
        if images is None:
            raise no_tower(bare, "vision")
        picture = picture.convert("RGB")
        if _takes_patches(bare) and not isinstance(images, Missing):
            return _fixed_size(picture, size, images)
        return torch.as_tensor(images(images=picture, return_tensors="pt")["pixel_values"][0])

    def text(texts: Sequence[str]) -> dict[str, Tensor]:
        if words is None:
            raise no_tower(bare, "text")
        found = words(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"].bool()}

    return Processor(image=image, text=text, image_size=size)


def _fixed_size(picture: Any, size: tuple[int, int], images: Any) -> Float[Tensor, "3 h w"]:
    """An image for SigLIP 2, at one size instead of NaFlex's own, so that images make a batch."""
    picture = picture.resize(size[::-1], resample=int(images.resample))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(*size, 3)
    mean, std = torch.tensor(images.image_mean), torch.tensor(images.image_std)
    return ((pixels / 255 - mean) / std).permute(2, 0, 1)


CLIP_HF = Family(
    name="clip_hf",
    matches=lambda model: bool(class_of(model, "transformers") & set(_CLIP)),
    rules=_CLIP_RULES,
    forward=forward,
    masks=masks,
    contrastive=Contrastive(encode_image, encode_text, logit_scale),
    load=load,
    reads=reads("clip", "clip_vision_model", "clip_text_model"),
    classes=_CLIP,
    canonical=canonical,
    towers=towers,
    as_mapping=pictures_and_texts,
)

SIGLIP_HF = Family(
    name="siglip_hf",
    matches=lambda model: bool(class_of(model, "transformers") & set(_SIGLIP)),
    rules=_SIGLIP_RULES,
    forward=_forward_siglip,
    masks=_masks_siglip,
    contrastive=Contrastive(encode_image, _encode_text_siglip, logit_scale),
    load=load,
    reads=reads(
        *(
            f"{name}{part}"
            for name in ("siglip", "siglip2")
            for part in ("", "_vision_model", "_text_model")
        )
    ),
    classes=_SIGLIP,
    canonical=canonical,
    towers=towers,
    as_mapping=pictures_and_texts,
)
