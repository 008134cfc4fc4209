"""From a basis to the two factors: who of A and B gets how much of the scale."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from corda_vlm.decompose.basis import Basis
from corda_vlm.decompose.orient import Root

# A direction in which W has less than this share of ‖W‖_F is rounding error of float32 weights.
_NOTHING = torch.finfo(torch.float32).eps


def split_output(
    w: Float[Tensor, "out inp"],
    basis: Basis,
    norm: float,
    root: Root,
    a_norm: float | None,
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"], int]:
    """`B A = Q Q^T W`: `B = Q Σ^1/2`, `A = Σ^-1/2 Q^T W`, or rows of A at `a_norm`.

    Args:
        w: `W / norm`, of Frobenius norm 1.
        norm: `‖W‖_F`.

    Returns:
        B, A, and the number of components that could not be split so; see `decompose`.
    """
    seen = basis.vectors.mT @ w  # (r, inp)
    norms = torch.linalg.vector_norm(seen, dim=1)  # (r,)
    dead = norms <= _NOTHING
    lost = dead | (basis.values <= norms * root.resolution)
    if a_norm is None:
        # balanced where Σ says nothing
        split = (norm * torch.where(lost, norms, root.scale * basis.values)).sqrt()
    else:
        split = norm * norms / a_norm
    split = torch.where(dead, 1.0, split)
    b = basis.vectors * torch.where(dead, 0.0, split)
    a = norm * seen / split[:, None]
    if dead.any():
        a = _complete_rows(a, dead, a_norm)
    return b, a, int((lost if a_norm is None else dead).sum())


def split_input(
    w: Float[Tensor, "out inp"], basis: Basis, norm: float, a_norm: float | None
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"], int]:
    """`B A = W P P^T`, balanced by its own SVD as LoRA-Null does (arXiv 2503.02659), or rows at `a_norm`.

    With `W P = U S Z^T` the rows of A are `S^1/2 (P Z)^T`: orthogonal, and in the span of P.
    """
    u, s, z = torch.linalg.svd(w @ basis.vectors, full_matrices=False)  # (out, r), (r,), (r, r)
    dead = s <= _NOTHING
    s = norm * s
    root = s.sqrt()
    if a_norm is None:
        b_norms, a_norms = root, torch.where(dead, _typical(root, dead), root)
    else:
        b_norms, a_norms = s / a_norm, torch.full_like(s, a_norm)
    b = u * torch.where(dead, 0.0, b_norms)
    return b, a_norms[:, None] * (z @ basis.vectors.mT), int(dead.sum())


def split_projection(
    w: Float[Tensor, "out inp"], vectors: Float[Tensor, "out r"], a_norm: float | None
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"], int]:
    """`B A = Q Q^T W`: `B = Q`, `A = Q^T W` as SC-LoRA does (arXiv 2505.23724), or rows of A at `a_norm`.

    Returns:
        B, A, and the number of directions in which W has nothing; with `a_norm` their columns of B are zero.
    """
    seen = vectors.mT @ w  # (r, inp)
    norms = torch.linalg.vector_norm(seen, dim=1)  # (r,)
    dead = norms <= _NOTHING * torch.linalg.norm(w)
    if a_norm is None:
        return vectors, seen, int(dead.sum())
    b = vectors * torch.where(dead, 0.0, norms / a_norm)
    a = seen * torch.where(dead, 0.0, a_norm / norms)[:, None]
    if dead.any():
        a = _complete_rows(a, dead, a_norm)
    return b, a, int(dead.sum())


def _complete_rows(
    a: Float[Tensor, "r inp"], dead: Bool[Tensor, " r"], a_norm: float | None
) -> Float[Tensor, "r inp"]:
    """`a` with its dead rows replaced by directions orthonormal to all others, of the live rows' norm."""
    live = a[~dead]
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(int(dead.sum()), a.shape[1], generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(torch.cat([live, random.to(a)]).mT).Q  # (inp, r)
    norms = torch.linalg.vector_norm(a, dim=1)
    scale = _typical(norms, dead) if a_norm is None else norms.new_full((), a_norm)
    a = a.clone()
    a[dead] = scale * q[:, len(live) :].mT
    return a


def _typical(norms: Float[Tensor, " r"], dead: Bool[Tensor, " r"]) -> Float[Tensor, ""]:
    """Mean of the live norms; 1 where nothing is alive."""
    return norms[~dead].mean() if not dead.all() else norms.new_ones(())
