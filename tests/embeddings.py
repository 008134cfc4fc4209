"""Embeddings of a CLIP of transformers, whose methods give a tensor in version 4 and an output that has it in 5."""

from __future__ import annotations

from typing import Any

import torch


def image_embeddings(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    out = model.get_image_features(pixels)
    return getattr(out, "pooler_output", out)
