"""Starts from a gradient, against their definitions in float64 with inverses and whole SVDs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corda_vlm import decompose
from corda_vlm.decompose import damp
from corda_vlm.decompose.gradient import A_NORM, FEATURE_ENERGY, GAMMA, WEIGHT_ENERGY
from corda_vlm.errors import CordaError

AS_PLANNED: dict[str, Any] = {"a_norm": None, "route": "auto", "seed": 0}
"""The defaults of a plan, which the functions themselves have not."""
decompose_gradient = partial(decompose.decompose_gradient, **AS_PLANNED)
decompose_lora_ga = partial(decompose.decompose_lora_ga, **AS_PLANNED)
decompose_keep_lora = partial(decompose.decompose_keep_lora, **AS_PLANNED)

SHAPES = [(24, 24), (40, 16), (16, 40), (300, 420), (420, 300)]


def make(out: int, inp: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient, a weight and a covariance whose spectra span several decades."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    falling = torch.logspace(0, -2, min(out, inp), dtype=torch.float64)
    left, right = (torch.linalg.qr(normal(n, len(falling))).Q for n in (out, inp))
    x = normal(3 * inp, inp) * torch.logspace(0, -3, inp, dtype=torch.float64)
    x = x @ torch.linalg.qr(normal(inp, inp)).Q
    return (left * falling) @ right.mT, normal(out, inp), x.mT @ x / len(x)


def inverse_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values**-0.5) @ vectors.mT


def overlap(one: Tensor, other: Tensor) -> float:
    """The smallest cosine between the row spaces of two matrices: 1 where they are the same."""
    a, b = (torch.linalg.qr(x.double().mT).Q for x in (one, other))
    return float(torch.linalg.svdvals(a.mT @ b)[-1])


class TestNatural:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("damping", [1e-4, 1e-2])
    def test_definition(self, shape, damping):
        """A spans the rows of `V_rᵀ C'^-½`, the values are those of `G C'^-½`, and B is zero."""
        G, _, C = make(*shape)
        start = decompose_gradient(G, C, rank=6, damping=damping)
        root = inverse_root(damp(C, damping))
        _, S, Vh = torch.linalg.svd(G @ root)
        fast = start.route == "fast"
        assert overlap(start.A, Vh[:6] @ root) > (0.99 if fast else 1 - 1e-6)
        torch.testing.assert_close(start.singular_values, S[:6], rtol=2e-3, atol=0)
        assert start.total_energy == pytest.approx(float(S.norm()), rel=1e-4)
        assert start.chosen_energy == pytest.approx(float(S[:6].norm()), rel=1e-3)
        assert not start.B.any()
        assert start.floored == 0
        torch.testing.assert_close(start.A.norm(dim=1), torch.full((6,), A_NORM))

    @given(
        shape=st.tuples(st.integers(2, 12), st.integers(2, 12)),
        data=st.data(),
        seed=st.integers(0, 10_000),
    )
    @settings(max_examples=40, deadline=None)
    def test_no_other_step_of_that_rank_gains_more_for_what_it_changes(self, shape, data, seed):
        """The best ΔW within A's row space reaches `‖(G C'^-½)_r‖`, and no other `B' A'` more, at equal damage."""
        rank = data.draw(st.integers(1, min(shape)))
        G, _, C = make(*shape, seed=seed)
        damped = damp(C, 1e-3)
        start = decompose_gradient(G, C, rank=rank, damping=1e-3)
        # the best ΔW = B A at ‖ΔW C'^½‖ = 1 gains ‖(G Aᵀ) (A C' Aᵀ)^-½‖
        generator = torch.Generator().manual_seed(seed)
        other = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)

        def gain(A: Tensor) -> float:
            A = torch.linalg.qr(A.double().mT).Q.mT
            return float((G @ A.mT @ inverse_root(A @ damped @ A.mT)).norm())

        best = float(torch.linalg.svdvals(G @ inverse_root(damped))[:rank].norm())
        assert gain(start.A) == pytest.approx(best, rel=1e-3)
        assert gain(other) <= best * (1 + 1e-9)

    def test_without_a_covariance_it_is_the_gradients_own_directions(self):
        G, _, _ = make(24, 40)
        start = decompose_gradient(G, rank=5, damping=0.0, a_norm=2.0)
        assert overlap(start.A, torch.linalg.svd(G).Vh[:5]) > 1 - 1e-6
        torch.testing.assert_close(start.A.norm(dim=1), torch.full((5,), 2.0))

    def test_a_singular_covariance_without_damping(self):
        """Directions that the knowledge does not use come first, and nothing becomes NaN."""
        G, _, _ = make(24, 24)
        C = torch.diag(torch.tensor([1.0] * 20 + [0.0] * 4, dtype=torch.float64))
        start = decompose_gradient(G, C, rank=4, damping=0.0)
        assert torch.isfinite(start.A).all()
        assert float(start.A[:, :20].norm() / start.A.norm()) < 1e-2

    def test_of_a_layer_that_the_knowledge_does_not_reach_it_is_the_gradients_own(self):
        G, W, C = make(24, 24)
        start = decompose_gradient(G, torch.zeros_like(C), rank=4, damping=1e-2)
        assert overlap(start.A, torch.linalg.svd(G).Vh[:4]) > 1 - 1e-6
        kept = decompose_keep_lora(G, W, torch.zeros_like(C), rank=2)
        torch.testing.assert_close(kept.A.norm(dim=1), torch.ones(2))

    def test_a_gradient_of_low_rank_is_completed(self):
        G, _, C = make(24, 24)
        U, S, Vh = torch.linalg.svd(G)
        G = (U[:, :2] * S[:2]) @ Vh[:2]
        start = decompose_gradient(G, C, rank=5, damping=1e-2)
        assert start.floored == 3
        assert int(torch.linalg.matrix_rank(start.A)) == 5

    def test_the_scale_of_gradient_and_covariance_does_not_matter(self):
        G, _, C = make(24, 40)
        one = decompose_gradient(G, C, rank=4, damping=1e-3)
        other = decompose_gradient((G * 1e-6).float(), (C * 1e4).float(), rank=4, damping=1e-3)
        torch.testing.assert_close(one.A, other.A, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_precisions(self, dtype):
        G, _, C = make(24, 40)
        start = decompose_gradient(G.to(dtype), C.float(), rank=4, damping=1e-2)
        assert start.A.dtype == torch.float32
        assert overlap(start.A, decompose_gradient(G, C, rank=4, damping=1e-2).A) > 0.95

    def test_refusals(self):
        G, _, C = make(24, 40)
        with pytest.raises(CordaError, match="gradient is zero"):
            decompose_gradient(torch.zeros(24, 40), C, rank=4, damping=1e-2)
        with pytest.raises(CordaError, match="rank 25"):
            decompose_gradient(G, C, rank=25, damping=1e-2)
        with pytest.raises(CordaError, match="NaN"):
            decompose_gradient(G * torch.nan, C, rank=4, damping=1e-2)


class TestLoraGa:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_definition(self, shape):
        """Equation 11 of the paper: A the first r right singular vectors, B the next r left ones."""
        G, _, _ = make(*shape)
        start = decompose_lora_ga(G, rank=4)
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        near = 0.98 if start.route == "fast" else 1 - 1e-6
        assert overlap(start.A, Vh[:4]) > near
        assert overlap(start.B.mT, U[:, 4:8].mT) > near
        scale = shape[0] ** 0.25 / GAMMA**0.5
        torch.testing.assert_close(start.A.norm(dim=1), torch.full((4,), scale))
        torch.testing.assert_close(start.B.norm(dim=0), torch.full((4,), scale))

    def test_a_norm_keeps_the_product(self):
        G, _, _ = make(24, 40)
        one, other = decompose_lora_ga(G, rank=4), decompose_lora_ga(G, rank=4, a_norm=10.0)
        torch.testing.assert_close(one.B @ one.A, other.B @ other.A)

    def test_it_takes_twice_its_rank(self):
        G, _, _ = make(16, 40)
        with pytest.raises(CordaError, match="take rank 8 at most"):
            decompose_lora_ga(G, rank=9)


class TestKeepLora:
    @pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
    def test_it_stays_off_what_weight_and_knowledge_use(self, shape):
        G, W, C = make(*shape)
        start = decompose_keep_lora(G, W, C, rank=2)
        _, S, Vh = torch.linalg.svd(W)
        share = (S**2).cumsum(0) / (S**2).sum()
        used = Vh[: int((share < WEIGHT_ENERGY).sum()) + 1]
        assert float((start.A.double() @ used.mT).abs().max()) < 1e-5
        # of the knowledge at most what is left beside the two principal parts
        seen = torch.einsum("ri,ij,rj->r", start.A.double(), C, start.A.double())
        assert float(seen.max()) < (1 - FEATURE_ENERGY) * float(C.trace()) + 1e-9
        torch.testing.assert_close(start.A.norm(dim=1), torch.ones(2))
        assert not start.B.any()
        assert 0 < start.chosen_energy <= start.total_energy


@pytest.mark.parametrize(("out", "inp", "count"), [(20, 12, 12), (12, 30, 5), (300, 280, 9)])
def test_the_values_alone_are_those_of_each_start(out, inp, count):
    """By the exact route, and of the largest matrix by the fast one."""
    gradient, weight, covariance = make(out, inp)
    how = {"count": count, "damping": 1e-2, "route": "auto", "seed": 0}
    expected = torch.linalg.svdvals(gradient.double() @ inverse_root(damp(covariance, 1e-2)))
    found = decompose.gradient_spectrum(gradient, covariance, **how)
    torch.testing.assert_close(found, expected[:count], rtol=2e-2, atol=0)
    found = decompose.gradient_spectrum(gradient, **how)
    expected = torch.linalg.svdvals(gradient.double())
    torch.testing.assert_close(found, expected[:count], rtol=2e-2, atol=0)
    start = decompose.decompose_keep_lora(
        gradient, weight, covariance, rank=2, a_norm=None, route="exact", seed=0
    )
    found = decompose.gradient_spectrum(gradient, covariance, weight, **how)
    torch.testing.assert_close(found[:2], start.singular_values, rtol=2e-2, atol=0)
