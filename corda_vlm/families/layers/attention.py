"""Packed attention layers, unpacked to `nn.Linear` while something has to see their parts.

`nn.MultiheadAttention` (open_clip, the pooling head of SigLIP) and open_clip's own `Attention` keep the query,
key and value weights in one `in_proj_weight` and never call them as modules: a forward hook on a part never
fires, and PEFT cannot wrap one. Neither does the pool of open_clip's ResNets call its parts, though it has them.
`unpack` puts a module with `nn.Linear` children `q_proj`, `k_proj`, `v_proj`, `out_proj` (of a pool `c_proj`) in
their place; `pack` puts the *same* original module back, with the values of the parts.

The weights of the parts are views of the packed storage, so nothing is copied and an in-place edit of a part
is an edit of the packed parameter. Where a part has left that storage meanwhile (`model.to(dtype)`,
`weight.data = ...`) packing copies its values back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from corda_vlm.errors import CordaError
from corda_vlm.families.layers.conv1d import pack_conv1d, unpack_conv1d
from corda_vlm.families.layers.experts import pack_experts, unpack_experts
from corda_vlm.families.layers.packed import (
    PARTS,
    is_attention_pool,
    is_open_clip_attention,
    is_packed,
    packed_parts,
    packed_weights,
)
from corda_vlm.families.layers.quantized import keep_exact
from corda_vlm.families.layers.unpacked import (
    Unpacked,
    UnpackedAttention,
    UnpackedAttentionPool,
    UnpackedOpenClipAttention,
)

__all__ = ["PARTS", "is_packed", "pack", "packed_parts", "packed_weights", "unpack", "unpacked"]


def _is_bypassed_qkv(module: nn.Module) -> bool:
    """timm's BEiT and EVA attention: with a bias on q and v only, they call `F.linear(x, self.qkv.weight)`."""
    return (
        type(module).__module__.startswith("timm.")
        and isinstance(getattr(module, "qkv", None), nn.Module)
        and getattr(module, "q_bias", None) is not None
        and getattr(module, "qkv_bias_separate", None) is False
    )


def _refuse(module: Any, name: str) -> None:
    """Say which layers cannot be unpacked with equal outputs, before anything is touched."""
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(module, nn.MultiheadAttention):
        if type(module).forward is not nn.MultiheadAttention.forward:
            raise CordaError(
                f"{name}: {kind} overrides nn.MultiheadAttention.forward, so it cannot be unpacked to nn.Linear"
            )
        for option, on in (
            ("add_zero_attn", module.add_zero_attn),
            ("add_bias_kv", module.bias_k is not None),
        ):
            if on:
                raise CordaError(
                    f"{name}: nn.MultiheadAttention with {option}=True cannot be unpacked to nn.Linear; "
                    "leave its tower out (towers=...)"
                )
    elif is_open_clip_attention(module) and module.scaled_cosine:
        raise CordaError(f"{name}: {kind} with scaled_cosine=True cannot be unpacked to nn.Linear")


def unpack(model: nn.Module, *, experts: bool = False) -> list[str]:
    """Replace every packed attention layer of `model`, in place; return the dotted names of those replaced.

    Also makes timm's BEiT and EVA attention call their fused `qkv` layer, which they otherwise bypass, and shows
    GPT-2's `Conv1D` layers as `nn.Linear` (see `conv1d`).
    Layers already unpacked stay as they are. A layer used in two places stays one layer in two places. Layers of four bits are
    kept from being packed for inference alone (see `quantized.keep_exact`), which nothing undoes.

    Args:
        experts: also show the experts of mixtures and their routers (see `experts`). An adapter goes on the stack itself.

    Raises:
        CordaError: a layer cannot be unpacked with equal outputs; nothing is replaced then.
    """
    keep_exact(model)
    places = [
        (parent, key, name)
        for parent, key, name in _children(model)
        if is_packed(parent._modules[key])
    ]
    for parent, key, name in places:
        if key == "base_layer":
            raise CordaError(
                f"{name}: an adapter wraps the packed attention layer itself; remove it, then attach one that "
                "targets q_proj, k_proj, v_proj or out_proj"
            )
        _refuse(parent._modules[key], name)
    made: dict[int, Unpacked] = {}
    for parent, key, _ in places:
        original: Any = parent._modules[key]
        if id(original) not in made:
            made[id(original)] = _unpacked_kind(original)(original)
        parent._modules[key] = made[id(original)]
    names = [name for _, _, name in places]
    for name, module in model.named_modules():
        if _is_bypassed_qkv(module):
            vars(module).update(qkv_bias_separate=True, _corda_bypassed_qkv=True)
            names.append(name)
    names += unpack_conv1d(model)
    return names + unpack_experts(model) if experts else names


def _unpacked_kind(packed: nn.Module) -> type[Unpacked]:
    if isinstance(packed, nn.MultiheadAttention):
        return UnpackedAttention
    return UnpackedAttentionPool if is_attention_pool(packed) else UnpackedOpenClipAttention


def pack(model: nn.Module) -> list[str]:
    """Undo `unpack`, in place; return the dotted names of the layers put back.

    The original modules and parameters return (the same objects), with the parts' values, device, dtype,
    gradients, and trainable where any part was. Adapters are not merged.

    Raises:
        CordaError: an adapter is still attached to a part; nothing is packed then.
    """
    return _pack(model, only=None)


@contextmanager
def unpacked(model: nn.Module) -> Iterator[nn.Module]:
    """Unpack `model`, experts included, for the length of the block; pack it again on the way out, exceptions included.

    Re-entrant: an inner block finds nothing packed, and leaves packing to the outer one. Layers to which an
    adapter was attached inside the block belong to the adapter and stay unpacked until it is removed.
    """
    names = unpack(model, experts=True)
    try:
        yield model
    finally:
        _pack(model, only=names)


def _pack(model: nn.Module, only: Sequence[str] | None) -> list[str]:
    places = [
        (parent, key, name, unpacked_layer)
        for parent, key, name in _children(model)
        if isinstance(unpacked_layer := parent._modules[key], Unpacked)
        and (only is None or name in only)
    ]
    names, packed = [], set()
    for _, _, name, layer in places:
        if wrapped := [
            part for part in layer.parts if not isinstance(getattr(layer, part), nn.Linear)
        ]:
            if only is None:
                raise CordaError(
                    f"{name}.{wrapped[0]} is a {type(getattr(layer, wrapped[0])).__name__}, not a plain nn.Linear: "
                    "restore or export the adapter before packing"
                )
            packed.add(id(layer))  # the adapter's now
            continue
        names.append(name)
    linears = pack_conv1d(model, only) + pack_experts(model, only)
    for parent, key, name, layer in places:
        if name not in names:
            continue
        if id(layer) not in packed:
            _copy_back(layer)
            packed.add(id(layer))
        parent._modules[key] = layer.packed
    for name, module in model.named_modules():
        if (only is None or name in only) and vars(module).pop("_corda_bypassed_qkv", False):
            vars(module)["qkv_bias_separate"] = False
            names.append(name)
    return names + linears


def _children(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """(parent, key, dotted name) of every child, shared ones once for each place they are in."""
    return [
        (parent, key, f"{prefix}.{key}" if prefix else key)
        for prefix, parent in model.named_modules()
        for key, child in parent._modules.items()
        if child is not None
    ]


def _copy_back(layer: Unpacked) -> None:
    """Give the packed original the state of the parts."""
    packed = layer.packed
    if isinstance(layer, UnpackedAttentionPool):
        packed._modules.update(layer._modules)
        packed._parameters.update(layer._parameters)
        packed.train(layer.training)
        return
    packed._modules["out_proj"] = layer.out_proj
    linears = [getattr(layer, part) for part in PARTS[:3]]
    if packed.in_proj_weight is not None:
        _join(packed, "in_proj_weight", [linear.weight for linear in linears])
    else:
        for part, linear in zip(PARTS, linears, strict=False):
            _join(packed, f"{part}_weight", [linear.weight])
    if packed.in_proj_bias is not None:
        _join(packed, "in_proj_bias", [linear.bias for linear in linears])
    if "head_scale" in layer._parameters:
        packed._parameters["head_scale"] = layer._parameters["head_scale"]
    packed.train(layer.training)


def _join(packed: nn.Module, name: str, parts: Sequence[Tensor]) -> None:
    """Put the parts' values, gradients and `requires_grad` into a parameter of the packed layer."""
    joined = getattr(packed, name)
    values = [part.detach() for part in parts]
    if values[0].device.type != joined.device.type:
        joined = nn.Parameter(
            torch.cat(values)
        )  # a parameter cannot change its kind of device in place
        setattr(packed, name, joined)
    elif values[0].dtype != joined.dtype or values[0].device != joined.device:
        joined.data = torch.cat(values)
    else:
        for own, value in zip(
            joined.detach().split([len(value) for value in values]), values, strict=True
        ):
            if own.data_ptr() != value.data_ptr() or own.stride() != value.stride():
                own.copy_(value)
    if any(part.grad is not None for part in parts):
        joined.grad = torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in parts])
    joined.requires_grad_(any(part.requires_grad for part in parts))
