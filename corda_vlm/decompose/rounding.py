"""What rounding a weight matrix to a few values costs, and the pair of factors that takes most of it back.

A layer keeps `Q(W)` in place of `W`. The change of its outputs on data of the second moment C is `‖(W − Q(W)) C^½‖_F`, and by Eckart
and Young no pair of rank r leaves less of it than the r largest singular components of `(W − Q(W)) C'^½`:

    (W − Q(W)) C'^½ = U S Vᵀ,        B A = U_r S_r V_rᵀ C'^-½ = U_r U_rᵀ (W − Q(W)),

so no root is inverted. That is QERA's exact solution (arXiv 2410.06040, theorem 1); with the identity for C it is LoftQ's
(arXiv 2310.08659), one step of its alternation: the base stays `Q(W)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.decompose.decomposition import Decomposition, Route, decompose
from corda_vlm.decompose.orient import Root
from corda_vlm.errors import CordaError


@dataclass(frozen=True)
class RoundingError:
    """How far an approximation `V` of a weight `W` is off, as energies: squares of Frobenius norms.

    Attributes:
        weight: `‖W − V‖²`.
        of_weight: `‖W‖²`.
        outputs: `‖(W − V) C^½‖²`; None without C.
        of_outputs: `‖W C^½‖²`; None without C.
    """

    weight: float
    of_weight: float
    outputs: float | None = None
    of_outputs: float | None = None

    @property
    def relative(self) -> float:
        """`‖W − V‖ / ‖W‖`."""
        return _root(self.weight, self.of_weight)

    @property
    def relative_outputs(self) -> float | None:
        """`‖(W − V) C^½‖ / ‖W C^½‖`; None without C."""
        if self.outputs is None or self.of_outputs is None:
            return None
        return _root(self.outputs, self.of_outputs)


def rounding_error(
    weight: Float[Tensor, "out inp"],
    approximation: Float[Tensor, "out inp"],
    covariance: Float[Tensor, "inp inp"] | None = None,
) -> RoundingError:
    """How far `approximation` is off, in float64."""
    w = weight.double()
    error = w - approximation.double()
    sizes = float(error.square().sum()), float(w.square().sum())
    if covariance is None:
        return RoundingError(*sizes)
    c = covariance.to(w)
    # tr(E C Eᵀ), which rounding may leave a hair below zero
    return RoundingError(*sizes, *(max(0.0, float(((m @ c) * m).sum())) for m in (error, w)))


def decompose_error(
    weight: Float[Tensor, "out inp"],
    rounded: Float[Tensor, "out inp"],
    covariance: Float[Tensor, "inp inp"] | Root | None = None,
    *,
    rank: int,
    damping: float,
    a_norm: float | None,
    route: Route,
    seed: int,
) -> Decomposition:
    """The pair `B A` of rank r with the least `‖(W − Q(W) − B A) C'^½‖_F`.

    Args:
        weight: `W`.
        rounded: `Q(W)`.
        covariance: C, or its `Root` of power 1/2 and this damping; None is the identity, as LoftQ has it.
        rank, damping, a_norm, route, seed: as of `decompose`.

    Raises:
        CordaError: shapes that differ, and what `decompose` raises.
    """
    if weight.shape != rounded.shape:
        raise CordaError(
            f"the weight has shape {tuple(weight.shape)}, and what it was rounded to {tuple(rounded.shape)}"
        )
    error = weight.detach().double() - rounded.detach().to(weight.device, torch.float64)
    return decompose(
        error,
        covariance,
        rank=rank,
        components="largest",
        power=0.0 if covariance is None else 0.5,
        damping=damping,
        a_norm=a_norm,
        route=route,
        seed=seed,
    )


def _root(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole > 0 else 0.0
