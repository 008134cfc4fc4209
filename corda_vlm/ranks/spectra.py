"""What the rules look at: the singular values `σ_1 ≥ … ≥ σ_R` of `W C'`, `R = min(out, inp)`.

`C'` is the damped covariance at mean diagonal 1: π scales as `c^-½` under `C → cC`, and a negative logarithm of it
would turn every comparison round.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.decompose.basis import float64_device
from corda_vlm.errors import CordaError


def spectrum(
    weight: Float[Tensor, "out inp"], covariance: Float[Tensor, "inp inp"], *, damping: float
) -> Float[Tensor, " R"]:
    """All `R = min(out, inp)` singular values of `W C'`, descending, float64 on the CPU.

    Of `W C'` itself and not from the eigenvalues of its square: CorDA++ starts from the smallest values, and
    below the root of float64's precision (1e-8 of the largest) the square holds nothing but rounding.
    """
    device = float64_device(weight)
    oriented = weight.detach().to(device, torch.float64) @ normalized(
        covariance.to(device), damping
    )
    return torch.linalg.svdvals(oriented).cpu()


def normalized(covariance: Float[Tensor, "d d"], damping: float) -> Float[Tensor, "d d"]:
    """`C'` in float64 at mean diagonal 1."""
    matrix = covariance.detach().double()
    mean = float(matrix.diagonal().mean())
    if not (mean > 0 and bool(matrix.isfinite().all())):
        raise CordaError(f"covariance zero, NaN or Inf (mean diagonal {mean:g}); calibrate again")
    matrix = matrix / mean
    matrix.diagonal().add_(damping)
    return matrix / (1 + damping)


def checked(spectrum: Tensor, compactness: float, full: int, what: str) -> tuple[Tensor, float]:
    """The spectrum in float64 on the CPU, (R,), where cumulative sums never fall, and log π."""
    sigma = checked_values(spectrum, full, what)
    if not 1 <= compactness < math.inf:
        raise CordaError(
            f"{what}: its compactness {compactness:g} is not a finite number of 1 or more; take it from "
            "`corda_vlm.ranks.compactness`, which normalizes and damps the covariance"
        )
    return sigma, math.log(compactness)


def checked_values(values: Tensor, full: int, what: str) -> Float[Tensor, " R"]:
    """Singular values in float64 on the CPU, once it is clear that they are all of them, in order.

    Raises:
        CordaError: incomplete, not descending, negative or not finite.
    """
    sigma = values.detach().to("cpu", torch.float64)
    if len(sigma) != full:
        raise CordaError(
            f"{what}: {len(sigma)} singular values, but the full rank is {full}; the whole spectrum is "
            'needed, which the exact route gives: route="exact"'
        )
    bad = (sigma < 0) | ~sigma.isfinite()
    bad[1:] |= sigma[1:] > sigma[:-1]
    if bad.any():
        at = int(bad.nonzero()[0])
        raise CordaError(
            f"{what}: singular value {at + 1} of {len(sigma)} is {sigma[at]:.6g}, after "
            f"{sigma[max(at - 1, 0)]:.6g}; they have to be finite, not negative, and descending"
        )
    return sigma
