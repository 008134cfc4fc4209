"""The pair that takes back what rounding took away is the best of its rank, in the metric of C."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corda_vlm import decompose as rooms
from corda_vlm.decompose import RoundingError, damp, rounding_error
from corda_vlm.errors import CordaError
from tests.decompose.test_decompose import SHAPES, anisotropic, root

decompose_error = partial(rooms.decompose_error, damping=1e-4, a_norm=None, route="auto", seed=0)


def coarse(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to nine values a row."""
    scale = weight.abs().amax(1, keepdim=True) / 4
    return (weight / scale).round() * scale


@settings(deadline=None, max_examples=25)
@given(shape=st.sampled_from(SHAPES), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_no_pair_of_the_rank_leaves_less(shape, rank, seed):
    weight, covariance = anisotropic(*shape, seed=seed)
    damped = damp(covariance, 1e-4).double()
    error = (weight - coarse(weight)).double()
    found = decompose_error(weight, coarse(weight), covariance, rank=rank)
    product = found.B.double() @ found.A.double()
    left = float(((error - product) @ root(damped, 0.5)).norm())
    # Eckart and Young: the singular values that a rank leaves over
    spectrum = torch.linalg.svdvals(error @ root(damped, 0.5))
    assert left == pytest.approx(
        float(spectrum[rank:].norm()), rel=1e-3, abs=1e-6 * float(spectrum[0])
    )
    # so any other pair leaves more, LoftQ's and random changes of this one included
    loftq = decompose_error(weight, coarse(weight), rank=rank)
    generator = torch.Generator().manual_seed(seed)
    near = (
        found.B
        + 0.01
        * torch.randn(found.B.shape, generator=generator)
        * found.B.norm()
        / found.B.numel() ** 0.5
    )
    for B, A in ((loftq.B, loftq.A), (near, found.A)):
        other = float(((error - B.double() @ A.double()) @ root(damped, 0.5)).norm())
        assert left <= other * (1 + 1e-6)
    # and without C LoftQ's is the best of the weight alone
    of_weight = [float((error - f.B.double() @ f.A.double()).norm()) for f in (loftq, found)]
    assert of_weight[0] <= of_weight[1] * (1 + 1e-6)
    assert of_weight[0] == pytest.approx(
        float(torch.linalg.svdvals(error)[rank:].norm()), rel=1e-3, abs=1e-6
    )


def test_errors_are_those_of_the_definition():
    weight, covariance = anisotropic(24, 16)
    approximation = coarse(weight)
    error = rounding_error(weight, approximation, covariance)
    off = (weight - approximation).double()
    assert error.relative == pytest.approx(float(off.norm() / weight.double().norm()))
    half = root(covariance, 0.5)
    expected = float((off @ half).norm() / (weight.double() @ half).norm())
    assert error.relative_outputs == pytest.approx(expected, rel=1e-4)
    alone = rounding_error(weight, approximation)
    assert alone.relative_outputs is None
    assert alone.relative == error.relative
    assert RoundingError(0.0, 0.0).relative == 0
    assert math.isfinite(error.weight)


def test_shapes_that_differ():
    with pytest.raises(CordaError, match=r"shape \(4, 3\), and what it was rounded to \(3, 4\)"):
        decompose_error(torch.randn(4, 3), torch.randn(3, 4), rank=1)


def test_nothing_was_taken_away():
    """A pair of zeros in effect, and finite ones: LoRA's start."""
    weight = torch.randn(8, 6)
    found = decompose_error(weight, weight, torch.eye(6), rank=2)
    assert bool(torch.isfinite(found.A).all())
    assert not bool((found.B @ found.A).any())
