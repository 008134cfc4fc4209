"""Weights of which each process holds a piece, as PyTorch's `fully_shard` (FSDP2) leaves them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_in_pieces(tensor: Tensor) -> bool:
    """Is it a distributed tensor?"""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered where each process holds a piece; all processes then have to call this.

    Differentiable: a gradient that all processes compute alike goes to each one's piece as it is, and is not added up over them.
    """
    pieces: Any = tensor
    return pieces.full_tensor() if is_in_pieces(tensor) else tensor
