"""Packed attention layers: those whose parts are no modules of their own, and their parts as views."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.errors import CordaError

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


def is_packed(module: nn.Module | None) -> bool:
    """Is `module` an attention layer whose parts are not modules of their own?"""
    return isinstance(module, nn.MultiheadAttention) or is_open_clip_attention(module)


def packed_parts(module: Any) -> dict[str, tuple[Float[Tensor, "out inp"], Tensor | None]]:
    """Part name -> (weight (out, in), bias (out,) or None) of a packed layer, as views that share its storage."""
    weights = [weight.detach() for weight in packed_weights(module).values()]
    bias = module.in_proj_bias
    biases = tuple(bias.detach().chunk(3)) if bias is not None else (None, None, None)  # 3 x (E,)
    outer = module.out_proj.bias
    parts = zip(weights, (*biases, None if outer is None else outer.detach()), strict=True)
    return dict(zip(PARTS, parts, strict=True))


def packed_weights(module: Any) -> dict[str, Float[Tensor, "out inp"]]:
    """Part name -> weight (out, in) of a packed layer: views through which a gradient reaches its parameters."""
    if not is_packed(module):
        raise CordaError(f"{type(module).__name__} is not a packed attention layer")
    weight = module.in_proj_weight
    if weight is not None:
        weights = weight.chunk(3, dim=0)  # 3 x (E, E)
    else:  # nn.MultiheadAttention with kdim or vdim of its own keeps three parameters
        weights = tuple(getattr(module, f"{name}_weight") for name in PARTS[:3])
    return dict(zip(PARTS, (*weights, module.out_proj.weight), strict=True))


def is_open_clip_attention(module: nn.Module | None) -> bool:
    # by name, so that this file does not import open_clip for models that never use it
    return (
        type(module).__name__ == "Attention" and type(module).__module__ == "open_clip.transformer"
    )
