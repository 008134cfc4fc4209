"""What plain PEFT and transformers make of what a tool wrote, in a process that knows nothing of corda_vlm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits of a batch."""
    model.eval()
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def batch_of(text: str, processor: Any) -> dict[str, Tensor]:
    """One text as a batch of a model that generates text."""
    return processor.collate([processor.encode(text)])


def departure(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def peft_type(folder: Path) -> str:
    """What the configuration of an adapter says that it is."""
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
