"""The modules that stand in the place of packed attention layers, their parts being `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from corda_vlm.errors import CordaError
from corda_vlm.families.layers.packed import PARTS, POOL_PARTS, packed_parts


class Unpacked(nn.Module):
    """Holds the parts as `nn.Linear`, and the original, unregistered, to put it back.

    Attributes:
        parts: their names.
    """

    parts: tuple[str, ...] = PARTS
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    packed: Any

    def __init__(self, packed: Any) -> None:
        super().__init__()
        self._add_parts(packed)
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

    def _add_parts(self, packed: Any) -> None:
        for part, (weight, bias) in packed_parts(packed).items():
            if part != "out_proj":
                self.add_module(
                    part, _view_linear(weight, bias, trainable=_trainable(packed, part))
                )
        self.out_proj = packed.out_proj

    def extra_repr(self) -> str:
        return f"unpacked {type(self.packed).__name__}"


class UnpackedAttention(Unpacked):
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


class UnpackedOpenClipAttention(Unpacked):
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


class UnpackedAttentionPool(Unpacked):
    """The attention pool of open_clip's ResNets, calling its parts.

    Of its outputs only that of the first query is used, the mean of the tokens: no other is computed here, so that what `q_proj`
    and `c_proj` are seen to read is what has an effect.
    """

    parts = POOL_PARTS
    c_proj: nn.Linear
    positional_embedding: nn.Parameter

    def __init__(self, packed: Any) -> None:
        super().__init__(packed)
        self.num_heads: int = packed.num_heads
        self.positional_embedding = packed.positional_embedding

    def _add_parts(self, packed: Any) -> None:
        for part in self.parts:
            self.add_module(part, getattr(packed, part))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """As `open_clip.modified_resnet.AttentionPool2d.forward`."""
        tokens = x.flatten(2).transpose(1, 2)  # (N, HW, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)  # (N, HW + 1, C)
        q, k, v = (
            project(read).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, H, 1 | HW + 1, C/H)
            for project, read in (
                (self.q_proj, tokens[:, :1]), (self.k_proj, tokens), (self.v_proj, tokens),
            )
        )  # fmt: skip
        mixed = F.scaled_dot_product_attention(q, k, v)  # (N, H, 1, C/H)
        return self.c_proj(mixed.flatten(1))


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
