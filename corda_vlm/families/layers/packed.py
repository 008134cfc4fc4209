"""Packed attention layers: those whose parts are never called as modules of their own, and their parts as views."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.errors import CordaError

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
POOL_PARTS = ("k_proj", "q_proj", "v_proj", "c_proj")  # in the order of its modules


def is_packed(module: nn.Module | None) -> bool:
    """Is `module` an attention layer that never calls its parts as modules?"""
    return (
        isinstance(module, nn.MultiheadAttention)
        or is_open_clip_attention(module)
        or is_attention_pool(module)
    )


def packed_parts(module: Any) -> dict[str, tuple[Float[Tensor, "out inp"], Tensor | None]]:
    """Part name -> (weight (out, in), bias (out,) or None) of a packed layer, as views that share its storage."""
    if is_attention_pool(module):
        linears = {part: getattr(module, part) for part in POOL_PARTS}
        return {n: (linear.weight.detach(), linear.bias.detach()) for n, linear in linears.items()}
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
    if is_attention_pool(module):
        return {part: getattr(module, part).weight for part in POOL_PARTS}
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


def is_attention_pool(module: nn.Module | None) -> bool:
    """The pool of open_clip's ResNets, whose `nn.Linear` parts are read by `F.multi_head_attention_forward`, never called."""
    return (
        type(module).__name__ == "AttentionPool2d"
        and type(module).__module__ == "open_clip.modified_resnet"
    )
