"""How strong a trained model is: anywhere between where its weights began and where training took them, for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from corda_vlm.adapter.interpolate import between

STEPS = 7
"""Halvings of the range of strengths: to below a hundredth."""


class Course:
    """The way of a model's trained weights, from where they are when this is made to where a training takes them.

    At strength s each of them is `start + s (end − start)`. So for weights trained in full a weight is `W + s ΔW`, and so it is
    for an adapter whose product B A starts at zero, of which A stays as trained and B is scaled, and for one whose A is frozen.
    Of any other, a pair that starts elsewhere or DoRA, both factors go their way: their product is at 0 and 1 what
    it is there, and in between near that line. Every strength is thus an adapter of the same rank, which any tool loads.

    Memory: twice the trained weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._start = {name: value.detach().clone() for name, value in _moving(model).items()}
        self._end: dict[str, Tensor] = {}

    def arrive(self) -> None:
        """The weights are where training has taken them."""
        self._end = {name: value.detach().clone() for name, value in self._now().items()}

    @torch.no_grad()
    def go_to(self, strength: float) -> None:
        """Give the model this strength: 0 as it began, 1 as it was trained, each to the bit."""
        for name, value in self._now().items():
            start, end = (weights[name].to(value.device) for weights in (self._start, self._end))
            value.copy_(between(start, end, strength))

    def _now(self) -> dict[str, Tensor]:
        """The weights as the model has them: one that goes to another device may get new tensors."""
        every = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        return {name: every[name] for name in self._start}


def _moving(model: nn.Module) -> dict[str, Tensor]:
    """What the strength changes: what is trained and the running statistics that go with it, but no A whose B starts at
    zero."""
    trained: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                    trained[f"{prefix}.{name}".lstrip(".")] = buffer
    return {n: value for n, value in trained.items() if not _partner_is_zero(n, trained)}


def _partner_is_zero(name: str, trained: dict[str, Any]) -> bool:
    B = trained.get(name.replace(".lora_A.", ".lora_B."))
    return ".lora_A." in name and B is not None and not bool(B.any())


def largest_strength(keeps: Callable[[float], bool], steps: int = STEPS) -> float:
    """The largest strength at which the budget is kept, to `2 ** -steps`, by halving; what is kept falls with strength.

    Args:
        keeps: whether a strength above 0 and up to 1 keeps it. Strength 0, the model before training, does.
    """
    if keeps(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
