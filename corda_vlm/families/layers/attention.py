"""Packed attention layers, unpacked to `nn.Linear` while something has to see their parts.

`nn.MultiheadAttention` (open_clip, the pooling head of SigLIP) and open_clip's own `Attention` keep the query,
key and value weights in one `in_proj_weight` and never call them as modules: a forward hook on a part never
fires, and PEFT cannot wrap one. `unpack` puts a module with `nn.Linear` children `q_proj`, `k_proj`, `v_proj`,
`out_proj` in their place; `pack` puts the *same* original module back, with the values of the parts.

The weights of the parts are views of the packed storage, so nothing is copied and an in-place edit of a part
is an edit of the packed parameter. Where a part has left that storage meanwhile (`model.to(dtype)`,
`weight.data = ...`) packing copies its values back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from corda_vlm.errors import CordaError
from corda_vlm.families.layers.conv1d import pack_conv1d, unpack_conv1d

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


# ------------------------------------------------------------------ which modules are packed


def is_packed(module: nn.Module | None) -> bool:
    """Is `module` an attention layer whose parts are not modules of their own?"""
    return isinstance(module, nn.MultiheadAttention) or _is_open_clip_attention(module)


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


def _is_open_clip_attention(module: nn.Module | None) -> bool:
    # by name, so that this file does not import open_clip for models that never use it
    return (
        type(module).__name__ == "Attention" and type(module).__module__ == "open_clip.transformer"
    )


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
    elif _is_open_clip_attention(module) and module.scaled_cosine:
        raise CordaError(f"{name}: {kind} with scaled_cosine=True cannot be unpacked to nn.Linear")


# ------------------------------------------------------------------ the modules put in their place


class _Unpacked(nn.Module):
    """Holds the parts as `nn.Linear`, and the original, unregistered, to put it back."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    packed: Any

    def __init__(self, packed: Any) -> None:
        super().__init__()
        for part, (weight, bias) in packed_parts(packed).items():
            if part != "out_proj":
                self.add_module(
                    part, _view_linear(weight, bias, trainable=_trainable(packed, part))
                )
        self.out_proj = packed.out_proj
        # Not a child: its parameters would be listed twice, and `.to()` would move them apart.
        self.__dict__["packed"] = packed
        # Hooks that others put on the original keep firing, and their handles keep removing them.
        for hooks in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        ):
            self.__dict__[hooks] = getattr(packed, hooks)
        for flags in (
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
            "_forward_hooks_always_called",
        ):
            self.__dict__[flags] = getattr(packed, flags)
        self.train(packed.training)

    def extra_repr(self) -> str:
        return f"unpacked {type(self.packed).__name__}"


class UnpackedAttention(_Unpacked):
    """`nn.MultiheadAttention` with its parts as `nn.Linear`: same call, same outputs, same masks.

    Uses `F.scaled_dot_product_attention`; with `need_weights=True` (the default, as in the original) the
    attention weights are returned too, which takes the explicit product.
    """

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__(packed)
        self.embed_dim, self.kdim, self.vdim = packed.embed_dim, packed.kdim, packed.vdim
        self.num_heads, self.head_dim = packed.num_heads, packed.head_dim
        self.batch_first, self.dropout = packed.batch_first, packed.dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: query (L, B, E), or (B, L, E) with `batch_first`, or (L, E).

        Masks: boolean ones are True where attention is *not* allowed, others are added to the scores;
        `attn_mask` is (L, S) or (B * heads, L, S), `key_padding_mask` (B, S).
        """
        if is_causal and attn_mask is None:
            raise CordaError(
                "attention with is_causal=True needs attn_mask too, as nn.MultiheadAttention does"
            )
        unbatched = query.dim() == 2
        sequence_first = not unbatched and not self.batch_first
        if unbatched:
            query, key, value = _alike(lambda x: x[None], query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif (
            sequence_first
        ):  # before the projections, so that whoever observes them always sees (B, L, E)
            query, key, value = _alike(lambda x: x.transpose(0, 1), query, key, value)
        projected = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        q, k, v = (self._heads(x) for x in projected)  # (B, H, L, E/H)
        bias = self._bias(q, k, attn_mask, key_padding_mask)
        p = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)  # (B, H, L, S)
            weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
            weights = F.dropout(weights, p)
            mixed = weights @ v
        else:
            weights = None
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, L, E)
        if unbatched:
            out = out[0]
        elif sequence_first:
            out = out.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights[0] if unbatched else weights
        return out, weights

    def _heads(self, x: Float[Tensor, "b l e"]) -> Float[Tensor, "b h l d"]:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _bias(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Float[Tensor, " *shape"] | None:
        """Both masks as one tensor to add to the scores, broadcastable to (B, H, L, S)."""
        bias = None
        if attn_mask is not None:
            bias = _additive(attn_mask, q.dtype)
            if bias.dim() == 3:
                bias = bias.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
            bias = padding if bias is None else bias + padding
        return bias


class UnpackedOpenClipAttention(_Unpacked):
    """open_clip's own `Attention` (blocks with qk_norm, scale_heads, ...) with its parts as `nn.Linear`."""

    ln_q: nn.Module
    ln_k: nn.Module
    ln_inner: nn.Module
    attn_drop: nn.Dropout
    out_drop: nn.Dropout
    head_scale: nn.Parameter | None

    def __init__(self, packed: Any) -> None:
        super().__init__(packed)
        self.num_heads: int = packed.num_heads
        for name in ("ln_q", "ln_k", "ln_inner", "attn_drop", "out_drop"):
            self.add_module(name, getattr(packed, name))
        self.register_parameter("head_scale", packed.head_scale)

    def forward(
        self, x: Float[Tensor, "n l c"], attn_mask: Tensor | None = None
    ) -> Float[Tensor, "n l c"]:
        """As `open_clip.transformer.Attention.forward`."""
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, H, L, C/H)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if attn_mask is not None:
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
            attn_mask = _additive(attn_mask, q.dtype)
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(
            self.ln_q(q), self.ln_k(k), v, attn_mask=attn_mask, dropout_p=drop
        )
        if self.head_scale is not None:
            x = x * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(x.transpose(1, 2).flatten(2))))


def _alike(change: Callable[[Tensor], Tensor], *tensors: Tensor) -> list[Tensor]:
    """`change` each tensor; what was one tensor before is one tensor after."""
    changed: dict[int, Tensor] = {}
    return [changed.setdefault(id(x), change(x)) for x in tensors]


def _additive(
    mask: Bool[Tensor, " *shape"] | Float[Tensor, " *shape"], dtype: torch.dtype
) -> Float[Tensor, " *shape"]:
    """A boolean mask (True: not allowed) as zeros and -inf; others as they are, in the scores' dtype."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _view_linear(weight: Tensor, bias: Tensor | None, *, trainable: tuple[bool, bool]) -> nn.Linear:
    """An `nn.Linear` over existing storage: nothing is allocated or initialized."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=trainable[0])
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=trainable[1])
    return linear


def _trainable(packed: Any, part: str) -> tuple[bool, bool]:
    weight = (
        packed.in_proj_weight
        if packed.in_proj_weight is not None
        else getattr(packed, f"{part}_weight")
    )
    return (
        weight.requires_grad,
        packed.in_proj_bias is not None and packed.in_proj_bias.requires_grad,
    )


# ------------------------------------------------------------------ unpack, pack


def unpack(model: nn.Module) -> list[str]:
    """Replace every packed attention layer of `model`, in place; return the dotted names of those replaced.

    Also makes timm's BEiT and EVA attention call their fused `qkv` layer, which they otherwise bypass, and shows
    GPT-2's `Conv1D` layers as `nn.Linear` (see `conv1d`).
    Layers already unpacked stay as they are. A layer used in two places stays one layer in two places.

    Raises:
        CordaError: a layer cannot be unpacked with equal outputs; nothing is replaced then.
    """
    found = [
        (parent, key, name)
        for parent, key, name in _children(model)
        if is_packed(parent._modules[key])
    ]
    for parent, key, name in found:
        if key == "base_layer":
            raise CordaError(
                f"{name}: an adapter wraps the packed attention layer itself; remove it, then attach one that "
                "targets q_proj, k_proj, v_proj or out_proj"
            )
        _refuse(parent._modules[key], name)
    made: dict[int, _Unpacked] = {}
    for parent, key, _ in found:
        original: Any = parent._modules[key]
        if id(original) not in made:
            kind = (
                UnpackedAttention
                if isinstance(original, nn.MultiheadAttention)
                else UnpackedOpenClipAttention
            )
            made[id(original)] = kind(original)
        parent._modules[key] = made[id(original)]
    names = [name for _, _, name in found]
    for name, module in model.named_modules():
        if _is_bypassed_qkv(module):
            vars(module).update(qkv_bias_separate=True, _corda_bypassed_qkv=True)
            names.append(name)
    return names + unpack_conv1d(model)


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
    """Unpack `model` for the length of the block; pack it again on the way out, exceptions included.

    Re-entrant: an inner block finds nothing packed, and leaves packing to the outer one. Layers to which an
    adapter was attached inside the block belong to the adapter and stay unpacked until it is removed.
    """
    names = unpack(model)
    try:
        yield model
    finally:
        _pack(model, only=names)


def _pack(model: nn.Module, only: Sequence[str] | None) -> list[str]:
    found = [
        (parent, key, name, unpacked_layer)
        for parent, key, name in _children(model)
        if isinstance(unpacked_layer := parent._modules[key], _Unpacked)
        and (only is None or name in only)
    ]
    names, packed = [], set()
    for _, _, name, layer in found:
        if wrapped := [part for part in PARTS if not isinstance(getattr(layer, part), nn.Linear)]:
            if only is None:
                raise CordaError(
                    f"{name}.{wrapped[0]} is a {type(getattr(layer, wrapped[0])).__name__}, not a plain nn.Linear: "
                    "restore or export the adapter before packing"
                )
            packed.add(id(layer))  # the adapter's now
            continue
        names.append(name)
    linears = pack_conv1d(model, only)
    for parent, key, name, layer in found:
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


def _copy_back(layer: _Unpacked) -> None:
    """Give the packed original the state of the parts."""
    packed = layer.packed
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
    whole = getattr(packed, name)
    values = [part.detach() for part in parts]
    if values[0].device.type != whole.device.type:
        whole = nn.Parameter(
            torch.cat(values)
        )  # a parameter cannot change its kind of device in place
        setattr(packed, name, whole)
    elif values[0].dtype != whole.dtype or values[0].device != whole.device:
        whole.data = torch.cat(values)
    else:
        for own, value in zip(
            whole.detach().split([len(value) for value in values]), values, strict=True
        ):
            if own.data_ptr() != value.data_ptr() or own.stride() != value.stride():
                own.copy_(value)
    if any(part.grad is not None for part in parts):
        whole.grad = torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in parts])
    whole.requires_grad_(any(part.requires_grad for part in parts))
