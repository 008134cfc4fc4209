"""How much of the knowledge a change of a weight matrix touches."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def damp(covariance: Float[Tensor, "d d"], damping: float) -> Float[Tensor, "d d"]:
    """`C' = C + damping * mean(diag C) * I`, in the dtype of `covariance`; never changes its argument."""
    damped = covariance.clone()
    damped.diagonal().add_(damping * covariance.diagonal().mean())
    return damped


def knowledge_energy(
    delta: tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"]],
    covariance: Float[Tensor, "inp inp"],
) -> float:
    """`‖B A C‖_F` of `delta = (B, A)`, in float64.

    What KPM minimizes and IPM maximizes among all `Q Q^T W` of the same rank. Pass `damp(C, damping)` for
    the energy under `C'`.
    """
    b, a = (factor.double() for factor in delta)
    # ‖B Y‖ = ‖R Y‖ for B = Q R: an (r, inp) product, and no squares that cancel
    return float(torch.linalg.norm(torch.linalg.qr(b, mode="r").R @ (a @ covariance.double())))


def relative_damage(
    delta: tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"]],
    weight: Float[Tensor, "out inp"],
    covariance: Float[Tensor, "inp inp"],
) -> float:
    """`‖B A C^1/2‖_F² / ‖W C^1/2‖_F²`: the change of the layer's outputs on the knowledge, relative.

    1 when the adapter is the whole of `W`; 0 when it moves no output. Needs no square root of `C`.
    """
    b, a = (factor.double() for factor in delta)
    c = covariance.double()
    y = torch.linalg.qr(b, mode="r").R @ a  # (r, inp): ‖B A Z‖ = ‖Y Z‖
    changed = float(((y @ c) * y).sum())
    w = weight.double()
    whole = float(((w @ c) * w).sum())  # tr(W C W^T)
    return changed / whole if whole > 0 else 0.0
