"""SC-LoRA: the output directions that the new task uses and the knowledge does not (arXiv 2505.23724)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.decompose.basis import fix_signs, float64_device
from corda_vlm.decompose.decomposition import Decomposition, check_covariance, check_weight
from corda_vlm.decompose.energy import damp
from corda_vlm.decompose.split import split_projection
from corda_vlm.errors import CordaError


def decompose_contrast(
    weight: Float[Tensor, "out inp"],
    keep: Float[Tensor, "inp inp"],
    task: Float[Tensor, "inp inp"],
    *,
    rank: int,
    beta: float,
    damping: float,
    a_norm: float | None,
) -> Decomposition:
    """`B = Q`, `A = Q^T W` for Q the r largest eigenvectors of `W [(1 - beta) C_task - beta C_keep] W^T`.

    Both covariances are means over tokens, so that beta weighs the data sets and not their sizes. (The authors'
    code divides each sample's outputs by their largest entry first, which no covariance of inputs can tell.)

    Args:
        weight: `W`, any floating dtype.
        keep, task: mean second moments of the layer's inputs on the knowledge and on the new task.
        rank: r, from 1 to min(out, inp).
        beta: from 0 (the task alone) to 1 (the knowledge alone).
        damping: of `keep` in the energies that are reported; the directions take none, as in the paper.
        a_norm: None is the paper's split, B orthonormal; a number as in `decompose`.

    Returns:
        with `singular_values` and `spectrum` the eigenvalues, which can be negative, and the energies
        `‖W C'^1/2‖_F` and `‖B A C'^1/2‖_F` of the knowledge. Where `W` has no more outputs to give than
        directions with a positive value, those it cannot reach (value 0) come before negative ones; `floored`
        counts them.

    Raises:
        CordaError: shapes, rank, NaN or Inf, beta, damping or a_norm out of range; the message names it.
    """
    check_weight(weight, rank, damping, a_norm)
    for name, covariance in (("covariance", keep), ("task's covariance", task)):
        check_covariance(name, covariance, weight)
    check_beta(beta)
    out, inp = weight.shape
    device = float64_device(weight)
    w = weight.detach().to(device, torch.float64)
    knowledge = keep.to(device, torch.float64)
    contrast = (1 - beta) * task.to(device, torch.float64) - beta * knowledge  # (inp, inp)

    # all that is not zero lies in the span of W's columns, so a tall W needs the small matrix only
    span = torch.linalg.qr(w).Q if out > inp else None  # (out, inp)
    core = w if span is None else span.mT @ w
    values, vectors = torch.linalg.eigh(core @ contrast @ core.mT)
    values, vectors = values.flip(0), vectors.flip(1)  # descending
    if span is not None:
        vectors = span @ vectors
        if float(values[rank - 1]) < 0:
            values, vectors = _with_silent(values, vectors, rank)
    q = fix_signs(vectors[:, :rank])
    b, a, floored = split_projection(w, q, a_norm)
    damped = damp(knowledge, damping)
    seen = q.mT @ w  # (r, inp)
    return Decomposition(
        B=b.to(weight.device, torch.float32),
        A=a.to(weight.device, torch.float32),
        singular_values=values[:rank].cpu(),
        spectrum=values.cpu(),
        total_energy=_energy(w, damped),
        chosen_energy=_energy(seen, damped),
        floored=floored,
        side="output",
        route="exact",
    )


def check_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise CordaError(
            f"beta {beta} must lie between 0 (the new task alone) and 1 (the knowledge alone)"
        )


def _with_silent(
    values: Float[Tensor, " n"], vectors: Float[Tensor, "out n"], rank: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, "out n"]]:
    """With directions in which `W` has no output, of value 0, in front of the negative ones."""
    out, n = vectors.shape
    positive = int((values >= 0).sum())
    missing = min(rank - positive, out - n)
    silent = torch.linalg.qr(vectors, mode="complete").Q[:, n : n + missing]
    values = torch.cat([values[:positive], values.new_zeros(missing), values[positive:]])[:n]
    vectors = torch.cat([vectors[:, :positive], silent, vectors[:, positive:]], dim=1)[:, :n]
    return values, vectors


def _energy(x: Float[Tensor, "n inp"], covariance: Float[Tensor, "inp inp"]) -> float:
    """`‖X C^1/2‖_F`."""
    return math.sqrt(max(0.0, float(((x @ covariance) * x).sum())))
