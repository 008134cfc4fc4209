"""Losses as functions of features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def contrastive_loss(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    *,
    text_ids: Int[Tensor, "b l"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """CLIP's symmetric cross-entropy over the pairs of a batch (Radford et al. 2021, figure 3).

    Args:
        images, texts: features, normalized or not; row i of both is one pair.
        scale: multiplies the cosines.
        text_ids: tokens of the texts. If given, pairs (i, j) of different records with equal tokens are
            left out of the negatives of both directions: text j is as right for image i as its own.
        label_smoothing: of both cross-entropies.

    With distinct texts, or without `text_ids`, this is open_clip's `ClipLoss`.
    """
    logits = contrastive_logits(images, texts, scale)
    kept = torch.ones_like(logits, dtype=torch.bool)
    if text_ids is not None:
        _, kind = torch.unique(text_ids, dim=0, return_inverse=True)
        kept = (kind[:, None] != kind[None, :]) | torch.eye(
            len(kind), dtype=torch.bool, device=kind.device
        )
    return (
        _matching(logits, kept, label_smoothing) + _matching(logits.T, kept, label_smoothing)
    ) / 2


def _matching(
    logits: Float[Tensor, "b b"], kept: Bool[Tensor, "b b"], smoothing: float
) -> Float[Tensor, ""]:
    """Cross-entropy whose right answers are the diagonal and whose choices are the `kept` entries."""
    shares = logits.masked_fill(~kept, -torch.inf).log_softmax(dim=-1)
    right = shares.diagonal()
    if not smoothing:
        return -right.mean()
    even = shares.masked_fill(~kept, 0.0).sum(-1) / kept.sum(-1)
    return -((1 - smoothing) * right + smoothing * even).mean()


def contrastive_logits(
    images: Float[Tensor, "b d"], texts: Float[Tensor, "n d"], scale: Float[Tensor, ""]
) -> Float[Tensor, "b n"]:
    """Scaled cosines of every image to every text, in float32."""
    return (
        scale.float() * F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    )


def capped(scale: Float[Tensor, ""], most: float = 100.0) -> Float[Tensor, ""]:
    """A logit scale of at most 100, as CLIP trains it; the gradient passes as if it were not capped.

    A plain clamp would stop a model that starts at the cap, as all of OpenAI's do, from ever leaving it.
    """
    return scale + (scale.clamp(max=most) - scale).detach()
