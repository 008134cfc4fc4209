"""The rule of CorDA++ (arXiv 2506.13187): compact layers give their small components up first.

The formulas are read second hand, from a transcription of the paper.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corda_vlm.errors import CordaError
from corda_vlm.ranks.spectra import normalized
from corda_vlm.ranks.view import SiteView


def compactness(covariance: Float[Tensor, "d d"], out_features: int, *, damping: float) -> float:
    """`π(C') = √(out · σ_max(C')) / σ_min(C')`, at least `√out`; the lower, the more compact.

    Dropping the r-th smallest component changes the layer's outputs by at most `π · σ₋ᵣ`.

    Args:
        covariance: symmetric second moment of the layer's inputs, of any scale.
        out_features: rows of the layer's weight.
        damping: δ in units of the mean diagonal, 0 for plain `C`. It is always applied: across a
            threshold candidates would not compare, and a well-conditioned `C` hardly feels it.

    Raises:
        CordaError: NaN or Inf, zero, not positive semi-definite, or singular at `damping=0`.
    """
    eigenvalues = torch.linalg.eigvalsh(normalized(covariance, 0.0))  # (d,) ascending
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    # Damped here, not before: rounding below zero must not eat the damping up.
    low, high = ((max(value, 0.0) + damping) / (1 + damping) for value in (smallest, largest))
    if low <= 1e-15 * high or smallest < -1e-3 * largest:
        raise CordaError(
            f"a covariance has eigenvalues from {smallest:.3g} to {largest:.3g} (mean diagonal 1) and "
            f"damping {damping:g}: singular, or no second moment `X Xᵀ / count` at all; give a positive "
            "damping, e.g. 1e-4, or calibrate with more tokens"
        )
    return math.sqrt(out_features * high) / low


def by_compactness(site: SiteView, filtered: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`s(r) = log π · σ₋ᵣ / Σ_{k=1..R−r} σ_k` at `r = filtered`; a `RankRule`'s score."""
    assert site.spectrum is not None  # needs of the rule
    assert site.log_compactness is not None
    sigma = site.spectrum
    kept = sigma.cumsum(0)[len(sigma) - filtered - 1]
    # Where nothing is left to keep σ₋ᵣ is 0 too: such a component costs nothing.
    return site.log_compactness * torch.where(kept > 0, sigma[len(sigma) - filtered] / kept, 0.0)
