"""Which rows of a vision tower and of a projector are no part of an image: padding to patches, tiles or whole images.

A function here takes the configuration of a model and gives the part of its `Masking` that is about images. Models that pack
the patches of all images into one sequence (Qwen2-VL and later, GLM-4V, Pixtral) have no padding there.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from corda_vlm.families.base import Batch, Masking


def none_padded(config: Any) -> Masking:
    """Every row is part of an image."""
    return lambda batch: {}


def padded_pixels(config: Any) -> Masking:
    """Idefics3 and SmolVLM: `pixel_attention_mask` (B, N, H, W) says which pixels are there."""
    size = config.vision_config.patch_size

    def masks(batch: Batch) -> dict[str, Bool[Tensor, "b l"]]:
        padded = batch.get("pixel_attention_mask")
        return {} if padded is None else {"vision": _patches(batch["pixel_values"], padded, size)}

    return masks


def _patches(
    pixels: Float[Tensor, "b n 3 h w"], mask: Tensor, size: int
) -> Bool[Tensor, "images patches"]:
    """Which patches the tower sees of the images that are there: as Idefics3 does, images of zeros are none."""
    real = pixels.flatten(0, 1).flatten(1).ne(0).any(1)  # (B·N,)
    seen = mask.flatten(0, 1)[real].bool()  # (images, H, W)
    rows, columns = seen.shape[1] // size, seen.shape[2] // size
    cut = seen[:, : rows * size, : columns * size]
    cut = cut.unflatten(1, (rows, size)).unflatten(3, (columns, size))  # (images, R, P, C, P)
    return cut.any(4).any(2).flatten(1)


def padded_patches(config: Any) -> Masking:
    """LFM2-VL: `pixel_attention_mask` (images, P), and as many slots of the projector as patches fill by f × f."""
    factor = config.downsample_factor

    def masks(batch: Batch) -> dict[str, Bool[Tensor, "b l"]]:
        mask = batch.get("pixel_attention_mask")
        if mask is None:
            return {}
        slots = mask.shape[1] // factor**2
        filled = (batch["spatial_shapes"] // factor).prod(-1, keepdim=True)  # (images, 1)
        merged = torch.arange(slots, device=mask.device) < filled
        # the projector reads all slots of all images as one row of one image
        return {"vision": mask.bool(), "projector": merged.reshape(1, -1)}

    return masks


def placed_patches(config: Any) -> Masking:
    """Gemma 4: `image_position_ids` (images, P, 2), (-1, -1) where no patch is."""

    def masks(batch: Batch) -> dict[str, Bool[Tensor, "b l"]]:
        places = batch.get("image_position_ids")
        return {} if places is None else {"vision": (places != -1).all(-1)}

    return masks


def pooled_patches(config: Any) -> Masking:
    """Molmo 2: `image_token_pooling` (tokens, patches) says which patches each image token is pooled of, -1 for none."""

    def masks(batch: Batch) -> dict[str, Bool[Tensor, "b l"]]:
        pooled = batch.get("image_token_pooling")
        return {} if pooled is None else {"projector": pooled >= 0}

    return masks


def padded_tiles(config: Any) -> Masking:
    """Mllama: `aspect_ratio_mask` (B, N, T) says which tiles of an image are there; each is padded to eight patches.

    The cross-attention of its language model reads the states of tiles as they come, a sequence each.
    """
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1  # and a class token

    def masks(batch: Batch) -> dict[str, Bool[Tensor, "b l"]]:
        there = batch.get("aspect_ratio_mask")
        if there is None:
            return {}
        tiles = there.bool().flatten(0, 1)[..., None].expand(-1, -1, patches)  # (B·N, T, P)
        return {
            "vision": F.pad(tiles, (0, -patches % 8)).flatten(1),
            "projector": tiles.reshape(len(there), -1),
            "vision_states": tiles.flatten(0, 1),
        }

    return masks
