"""Starts that look at the new task's loss: the directions of its gradient, in a metric of the knowledge.

Let `G = ∂L/∂W` (out, inp) be the gradient of the new task's loss at the base model, and C the second moment of the layer's
inputs on the knowledge. To first order a change `ΔW` lowers the loss by `-⟨G, ΔW⟩`, and moves the layer's outputs on the
knowledge by `‖ΔW C'^1/2‖_F`. Among all changes of rank r that move them by no more than ε, the best is

    ΔW = -λ U_r S_r V_r^T C'^-1/2,        G C'^-1/2 = U S V^T,

the first r components of a natural-gradient step (Amari 1998; the input half of K-FAC, arXiv 1503.05671). Its row space is
spanned by the rows of `V_r^T C'^-1/2 = S_r^-1 U_r^T G C'^-1`: a LoRA that starts with these as A, and with B = 0, takes its
first step within the best r-dimensional space, and every later one within `{B A}` too while A is slow against B.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.decompose.basis import Basis, fix_signs, float64_device
from corda_vlm.decompose.decomposition import (
    Decomposition,
    Route,
    check_covariance,
    check_weight,
    find_basis,
)
from corda_vlm.decompose.orient import Root
from corda_vlm.errors import CordaError

A_NORM = 10.0
"""The norm of each row of A where none is asked for. Adam moves A and B by equal steps, so that a large A turns slowly: the
update stays among the directions that were chosen (see "What decides" in the README)."""

GAMMA = 16.0
"""LoRA-GA's γ, the value of its authors."""

WEIGHT_ENERGY, FEATURE_ENERGY = 0.85, 0.99
"""KeepLoRA's thresholds for a CLIP's vision tower, of its authors' configuration."""

_NOTHING = torch.finfo(torch.float32).eps


def decompose_gradient(
    gradient: Float[Tensor, "out inp"],
    covariance: Float[Tensor, "inp inp"] | Root | None = None,
    *,
    rank: int,
    damping: float,
    a_norm: float | None,
    route: Route,
    seed: int,
) -> Decomposition:
    """`B = 0` and `A = U_r^T G C'^-1`, each row at norm `a_norm`: what a natural-gradient step of rank r would see.

    No square root and no inverse of `C'` is formed: U comes from `G L^-T` with the Cholesky factor `C' = L L^T`.

    Args:
        gradient: `G`, any floating dtype.
        covariance: mean second moment of the layer's inputs on the knowledge, or its `Root` of power -1/2 and this damping, which
            the weights that read one stream share; None takes the gradient as it is.
        rank: r, from 1 to min(out, inp).
        damping: δ in `C' = C + δ mean(diag C) I`.
        a_norm: None is `A_NORM`.
        route, seed: as of `decompose`.

    Returns:
        with `singular_values` those of `G C'^-1/2`, and the energies `‖G C'^-1/2‖_F` as a whole and in the r components.
        Components in which the gradient has nothing take `C'^-1 z` with a random z as their rows; `floored` counts them.

    Raises:
        CordaError: shapes, rank, NaN or Inf, damping or a_norm out of range, or a gradient of zeros.
    """
    g, norm = _unit(gradient, covariance, rank, damping, a_norm)
    root = Root.of(covariance, -0.5, damping, g.device)
    basis = find_basis(g, root, rank, "largest", route, seed)
    dead = basis.values <= _NOTHING * basis.total_energy
    seen = _alive(basis.vectors.mT @ g, dead, seed)  # (r, inp)
    rows = seen if covariance is None else root.inverse(seen.mT).mT
    A = _at_norm(rows, A_NORM if a_norm is None else a_norm)
    return _start(gradient, torch.zeros(len(gradient), rank), A, basis, norm * root.scale, dead)


def decompose_lora_ga(
    gradient: Float[Tensor, "out inp"],
    *,
    rank: int,
    a_norm: float | None,
    route: Route,
    seed: int,
) -> Decomposition:
    """LoRA-GA (arXiv 2407.05000, equation 11): A the first r right singular vectors of G, B the next r left ones.

    Both are scaled by `out^1/4 / √γ`; the layer keeps `W - B A` beside them, so that the model starts where it was.

    Args:
        a_norm: the norm of each row of A, B by the inverse; None is the paper's.

    Raises:
        CordaError: as `decompose_gradient`; or a matrix whose smaller side is below 2 r.
    """
    check_pair_rank((len(gradient), gradient.shape[1]), rank)
    g, norm = _unit(gradient, None, rank, 0.0, a_norm)
    root = Root(None, 0.0, 0.0, g.device)
    both = find_basis(g, root, 2 * rank, "largest", route, seed)
    right = torch.linalg.qr(g.mT @ both.vectors[:, :rank]).Q  # (inp, r)
    scale = len(g) ** 0.25 / GAMMA**0.5
    own = scale if a_norm is None else a_norm
    B = both.vectors[:, rank:] * scale * (scale / own)
    first = Basis(both.vectors[:, :rank], both.values[:rank], None, both.total_energy)
    dead = first.values <= _NOTHING * first.total_energy
    return _start(gradient, B, own * fix_signs(right).mT, first, norm, dead)


def check_pair_rank(shape: tuple[int, int], rank: int, where: str = "") -> None:
    """Raise `CordaError` where a weight of this (out, inp) shape has fewer than the 2 r components that LoRA-GA takes."""
    if 2 * rank > min(shape):
        raise CordaError(
            f"{where}lora-ga takes 2·{rank} components, and a {shape[0]}×{shape[1]} weight has {min(shape)}; take rank "
            f"{min(shape) // 2} at most"
        )


def decompose_keep_lora(
    gradient: Float[Tensor, "out inp"],
    weight: Float[Tensor, "out inp"],
    covariance: Float[Tensor, "inp inp"],
    *,
    rank: int,
    a_norm: float | None,
    route: Route,
    seed: int,
) -> Decomposition:
    """KeepLoRA (arXiv 2601.19659): A the first right singular vectors of G off what the model uses; it is trained frozen.

    G is projected off the right singular vectors that hold `WEIGHT_ENERGY` of `‖W‖²`, and off the eigenvectors of C that
    are needed besides to hold `FEATURE_ENERGY` of its trace (the paper's features of earlier tasks; here of the knowledge).

    Args:
        a_norm: the norm of each row of A; None is 1, the paper's.

    Raises:
        CordaError: as `decompose_gradient`.
    """
    g, norm = _unit(gradient, covariance, rank, 0.0, a_norm)
    used = _principal(weight.to(g), covariance.to(g))  # (inp, k)
    rest = g - (g @ used) @ used.mT
    root = Root(None, 0.0, 0.0, g.device)
    basis = replace(
        find_basis(rest, root, rank, "largest", route, seed), total_energy=1.0
    )  # that of all of G
    dead = basis.values <= _NOTHING
    seen = _alive(basis.vectors.mT @ rest, dead, seed)
    seen = seen - (seen @ used) @ used.mT
    A = _at_norm(seen, 1.0 if a_norm is None else a_norm)
    return _start(gradient, torch.zeros(len(gradient), rank), A, basis, norm, dead)


def gradient_spectrum(
    gradient: Float[Tensor, "out inp"],
    covariance: Float[Tensor, "inp inp"] | None = None,
    weight: Float[Tensor, "out inp"] | None = None,
    *,
    count: int,
    damping: float,
    route: Route,
    seed: int,
) -> Float[Tensor, " count"]:
    """The largest singular values of what a start takes its directions from, descending, float64 on the CPU.

    Args:
        gradient: `G`.
        covariance: gives those of `G C'^-1/2`, of `decompose_gradient`; None those of G, of `decompose_lora_ga`.
        weight: with it, those of `decompose_keep_lora`: of G off what weight and covariance use most.
        count: how many, from 1 to min(out, inp).
        damping: δ in `C' = C + δ mean(diag C) I`.
        route, seed: as of `decompose`.

    Raises:
        CordaError: as the starts.
    """
    g, norm = _unit(gradient, covariance, count, damping, None)
    if weight is not None and covariance is not None:
        used = _principal(weight.to(g), covariance.to(g))
        g, covariance = g - (g @ used) @ used.mT, None
    root = Root(covariance, -0.5, damping, g.device)
    return find_basis(g, root, count, "largest", route, seed).values.cpu() * (norm * root.scale)


def _unit(
    gradient: Tensor,
    covariance: Tensor | Root | None,
    rank: int,
    damping: float,
    a_norm: float | None,
) -> tuple[Float[Tensor, "out inp"], float]:
    """`G / ‖G‖_F` in float64, where it can be, and the norm."""
    check_weight(gradient, rank, damping, a_norm)
    if covariance is not None:
        check_covariance("covariance", covariance, gradient)
    g = gradient.detach().to(float64_device(gradient), torch.float64)
    norm = float(torch.linalg.norm(g))
    if norm == 0:
        raise CordaError(
            "the gradient is zero: the new task's loss does not depend on this weight, so it has no directions to give; "
            "leave the layer out with towers=, roles= or targets="
        )
    return g / norm, norm


def _principal(
    weight: Float[Tensor, "out inp"], covariance: Float[Tensor, "inp inp"]
) -> Float[Tensor, "inp k"]:
    """An orthonormal basis of what the weight and the knowledge's features use most."""
    used = _up_to(weight.mT @ weight, WEIGHT_ENERGY, 0.0)
    rest = covariance - used @ (used.mT @ covariance)
    rest = rest - (rest @ used) @ used.mT
    whole = float(covariance.trace())
    if whole <= 0:  # a layer that the knowledge does not reach
        return used
    further = _up_to(rest, FEATURE_ENERGY * whole, 1.0 - float(rest.trace()) / whole, of=whole)
    return torch.cat([used, further], dim=1)


def _up_to(
    squared: Float[Tensor, "inp inp"], energy: float, held: float, of: float | None = None
) -> Float[Tensor, "inp k"]:
    """The first eigenvectors of a positive matrix that bring what is held of its trace up to a share."""
    values, vectors = torch.linalg.eigh(squared)
    values, vectors = values.clamp_min(0).flip(0), vectors.flip(1)  # descending
    whole = float(values.sum()) if of is None else of
    share = energy if of is None else energy / of
    count = int((held + values.cumsum(0) / whole < share).sum()) + (1 if held < share else 0)
    return vectors[:, : min(count, len(values))]


def _alive(rows: Float[Tensor, "r inp"], dead: Tensor, seed: int) -> Float[Tensor, "r inp"]:
    """The rows, those of components in which the gradient has nothing replaced by random ones."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
    return torch.where(dead[:, None], noise, rows)


def _at_norm(rows: Float[Tensor, "r inp"], norm: float) -> Float[Tensor, "r inp"]:
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows * (norm / lengths.clamp_min(torch.finfo(rows.dtype).tiny))


def _start(
    gradient: Tensor, B: Tensor, A: Tensor, basis: Basis, scale: float, dead: Tensor
) -> Decomposition:
    where = {"device": gradient.device, "dtype": torch.float32}
    return Decomposition(
        B=B.to(**where),
        A=A.to(**where),
        singular_values=scale * basis.values.cpu(),
        spectrum=None if basis.spectrum is None else scale * basis.spectrum.cpu(),
        total_energy=scale * basis.total_energy,
        chosen_energy=scale * float(torch.linalg.norm(basis.values)),
        floored=int(dead.sum()),
        side="input",
        route="fast" if basis.spectrum is None else "exact",
    )
