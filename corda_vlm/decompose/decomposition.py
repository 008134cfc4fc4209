"""One weight matrix, and the pair of factors its adapter starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.decompose.basis import (
    Basis,
    Components,
    float64_device,
    input_exact,
    input_fast,
    output_exact,
    output_fast,
    worth_iterating,
)
from corda_vlm.decompose.orient import Root
from corda_vlm.decompose.split import split_input, split_output
from corda_vlm.errors import CordaError, UnknownNameError

Side = Literal["output", "input"]
Route = Literal["auto", "exact", "fast"]


@dataclass(frozen=True)
class Decomposition:
    """The initial adapter of one weight matrix; the frozen residual is `W - B @ A`.

    Attributes:
        B: (out, r), float32.
        A: (r, inp), float32.
        singular_values: (r,) descending, float64: of `W C'^power` for the chosen components; for
            side="input" the eigenvalues of `C'^power`.
        spectrum: (min(out, inp),) descending, or (inp,) for side="input"; None when the fast route
            computed the chosen components only.
        total_energy: `‖W C'^power‖_F`.
        chosen_energy: `‖B A C'^power‖_F`, in the units of `total_energy`.
        floored: components too small to be split as the paper does (see `decompose`).
        side: "output" (`B A = Q Q^T W`) or "input" (`B A = W P P^T`).
        route: "exact" or "fast": the one that was taken.
    """

    B: Float[Tensor, "out r"]
    A: Float[Tensor, "r inp"]
    singular_values: Float[Tensor, " r"]
    spectrum: Float[Tensor, " n"] | None
    total_energy: float
    chosen_energy: float
    floored: int
    side: Side
    route: Literal["exact", "fast"]

    @property
    def energy_share(self) -> float:
        """Share of the knowledge energy that the adapter holds: `‖B A C'^p‖_F² / ‖W C'^p‖_F²`, in [0, 1]."""
        return (self.chosen_energy / self.total_energy) ** 2 if self.total_energy > 0 else 0.0


def decompose(
    weight: Float[Tensor, "out inp"],
    covariance: Float[Tensor, "inp inp"] | Root | None = None,
    *,
    rank: int,
    components: Components = "smallest",
    power: float = 1.0,
    side: Side = "output",
    damping: float,
    a_norm: float | None,
    route: Route,
    seed: int,
) -> Decomposition:
    """The rank-r part of `weight` that an adapter starts from (CorDA, section 3.2 and equation 6).

    Args:
        weight: `W`, any floating dtype.
        covariance: mean second moment of the layer's inputs, symmetric, or its `Root` of this power and damping, which the
            weights that read one stream share; None only with power 0.
        rank: r, from 1 to min(out, inp).
        components: "smallest" (knowledge preserved, MiLoRA) or "largest" (instruction previewed, PiSSA).
        power: `W` is oriented by `C'^power`: 0, 0.5 or 1.
        side: "output" keeps directions of the output, "input" directions of the input.
        damping: δ in `C' = C + δ mean(diag C) I`.
        a_norm: None is the paper's split of Σ (`B = U Σ^1/2`); a number g brings every row of A to the
            norm g and the columns of B to the inverse. `B A` is the same, Adam's steps on it are not.
        route: "exact" (whole spectrum), "fast" (block iteration), "auto" (fast for a rank that is small
            against a matrix that is large).
        seed: of the block that the fast route starts from.

    The same arguments give the same result; each direction's sign makes its largest entry positive.

    A component whose singular value is lost in rounding has no `Σ^-1/2`. Where `W` still acts on it (a
    singular `C` without damping) the norms of A's row and B's column are balanced instead. Where `W` does
    not (rank-deficient or zero `W`), A's row is an orthonormal completion and B's column zero, which is
    how LoRA starts. Both are counted in `floored`, and `B A` is the projection of `W` all the same.

    Raises:
        CordaError: shapes, rank, NaN or Inf, a damping or a_norm out of range; the message names it.
        UnknownNameError: components, side or route.
    """
    _check(weight, covariance, rank, components, power, side, damping, a_norm, route)
    device = float64_device(weight)
    w = weight.detach().to(device, torch.float64, copy=True)
    norm = float(torch.linalg.norm(w)) or 1.0
    w.div_(norm)
    root = Root.of(covariance, power, damping, device)
    # Without C the sides agree: W P P^T = Q Q^T W for the singular vectors of W itself.
    on_input = side == "input" and root.c is not None
    basis = find_basis(w, root, rank, components, route, seed, on_input=on_input)
    if on_input:
        b, a, floored = split_input(w, basis, norm, a_norm)
        chosen = (w @ basis.vectors) * basis.values  # W P Λ^power
    else:
        b, a, floored = split_output(w, basis, norm, root, a_norm)
        chosen = basis.values
    scale = norm * root.scale
    values_scale = root.scale if on_input else scale
    return Decomposition(
        B=b.to(weight.device, torch.float32),
        A=a.to(weight.device, torch.float32),
        singular_values=values_scale * basis.values.cpu(),
        spectrum=None if basis.spectrum is None else values_scale * basis.spectrum.cpu(),
        total_energy=scale * basis.total_energy,
        chosen_energy=scale * float(torch.linalg.norm(chosen)),
        floored=floored,
        side=side,
        route="fast" if basis.spectrum is None else "exact",
    )


def find_basis(
    w: Float[Tensor, "out inp"],
    root: Root,
    rank: int,
    components: Components,
    route: Route,
    seed: int,
    *,
    on_input: bool = False,
) -> Basis:
    """The chosen directions, by the fast route where it is asked for or pays, and can."""
    size = w.shape[1] if on_input else min(w.shape)
    if route == "fast" or (route == "auto" and worth_iterating(size, rank)):
        basis = (input_fast if on_input else output_fast)(w, root, rank, components, seed)
        if basis is not None:
            return basis
    return (input_exact if on_input else output_exact)(w, root, rank, components)


def _check(
    weight: Tensor,
    covariance: Tensor | Root | None,
    rank: int,
    components: str,
    power: float,
    side: str,
    damping: float,
    a_norm: float | None,
    route: str,
) -> None:
    for kind, name, choices in (
        ("components", components, ("smallest", "largest")),
        ("side", side, ("output", "input")),
        ("route", route, ("auto", "exact", "fast")),
        ("power", power, (0, 0.5, 1)),
    ):
        if name not in choices:
            raise UnknownNameError(kind, name, map(str, choices))
    check_weight(weight, rank, damping, a_norm)
    if covariance is not None:
        check_covariance("covariance", covariance, weight)
    elif power > 0:
        raise CordaError(f"power {power} needs a covariance; without data take power=0")


def check_weight(weight: Tensor, rank: int, damping: float, a_norm: float | None) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise CordaError(
            f"the weight has shape {tuple(weight.shape)}; a matrix (out, inp) is needed"
        )
    out, inp = weight.shape
    if not 1 <= rank <= min(out, inp):
        raise CordaError(
            f"rank {rank} is not between 1 and {min(out, inp)}, the smaller side of a {out}x{inp} weight; "
            "choose a smaller rank or leave this layer out"
        )
    check_damping_and_norm(damping, a_norm)
    _check_finite("weight", weight)


def check_damping_and_norm(damping: float, a_norm: float | None) -> None:
    if not (math.isfinite(damping) and damping >= 0):
        raise CordaError(f"damping {damping} must be a finite number, 0 or more")
    if a_norm is not None and not (math.isfinite(a_norm) and a_norm > 0):
        raise CordaError(
            f"a_norm {a_norm}, the norm of each row of A at the start, must be a finite number above 0, or None for "
            "the paper's split"
        )


def check_covariance(name: str, covariance: Tensor | Root, weight: Tensor) -> None:
    if isinstance(covariance, Root):
        if covariance.c is None:
            return
        covariance = covariance.c
    out, inp = weight.shape
    if covariance.shape != (inp, inp):
        raise CordaError(
            f"the {name} has shape {tuple(covariance.shape)}; a weight of {out}x{inp} needs ({inp}, {inp})"
        )
    _check_finite(name, covariance)
    if float(covariance.diagonal().min()) < 0:
        raise CordaError(f"the {name} has a negative diagonal entry: it is not a second moment")


def _check_finite(name: str, matrix: Tensor) -> None:
    if not matrix.is_floating_point():
        raise CordaError(f"the {name} is of {matrix.dtype}; a floating dtype is needed")
    # One NaN or Inf makes the norm NaN or Inf: no mask of the matrix's size.
    dtype = torch.float32 if matrix.dtype in (torch.float16, torch.bfloat16) else None
    if not math.isfinite(float(torch.linalg.vector_norm(matrix, dtype=dtype))):
        raise CordaError(f"the {name} holds NaN or Inf, or values too large to square")
