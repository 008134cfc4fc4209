"""Batches of the tiny CLIP models, and embeddings of those of transformers, which are a tensor in version 4 and an output that has it in 5."""

from __future__ import annotations

from typing import Any

import torch


def make_batch(size: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch of the tiny CLIP models: random pictures and texts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 98, (size, 12), generator=generator)
    ids[:, -1] = 99
    return {
        "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def image_embeddings(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    out = model.get_image_features(pixels)
    return getattr(out, "pooler_output", out)
