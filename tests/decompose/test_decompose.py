"""Every property is checked against a float64 SVD of `W C'^power`, by energy and not by factors."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from corda_vlm import decompose as rooms
from corda_vlm.decompose import Decomposition, damp, knowledge_energy, relative_damage
from corda_vlm.errors import CordaError, UnknownNameError

decompose = partial(rooms.decompose, damping=1e-4, a_norm=None, route="auto", seed=0)

SHAPES = [(24, 24), (40, 16), (16, 40)]
LARGE_SHAPES = [
    (300, 300),
    (420, 280),
    (600, 260),
    (280, 420),
]  # large enough for the fast route to be taken


def anisotropic(
    out: int,
    inp: int,
    *,
    decades: float = 3.0,
    seed: int = 0,
    tokens: int | None = None,
    massive: bool = True,
) -> tuple[Tensor, Tensor]:
    """A float32 weight and covariance with spectra over several decades, and "massive" constant channels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = min(out, inp)
    left, right = torch.linalg.qr(normal(out, rank)).Q, torch.linalg.qr(normal(inp, rank)).Q
    weight = (left * torch.logspace(0, -2, rank, dtype=torch.float64)) @ right.mT
    x = normal(tokens or 4 * inp, inp) * torch.logspace(0, -decades, inp, dtype=torch.float64)
    x = x @ torch.linalg.qr(normal(inp, inp)).Q
    if massive:
        x[:, :2] += 10
    return weight.float(), (x.mT @ x / len(x)).float()


def root(covariance: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * values.clamp_min(0) ** power) @ vectors.mT


def optimum(
    weight: Tensor, covariance: Tensor, rank: int, components: str, power: float = 1.0
) -> float:
    """The least or greatest `‖Q Q^T W C'^power‖_F` of the rank, from a float64 SVD (W of full rank)."""
    c = covariance.double() if power == 1 else root(covariance, power)
    values = torch.linalg.svdvals(weight.double() @ c)
    return float(torch.linalg.norm(values[:rank] if components == "largest" else values[-rank:]))


def energy(d: Decomposition, covariance: Tensor, power: float = 1.0) -> float:
    return knowledge_energy(
        (d.B, d.A), covariance.double() if power == 1 else root(covariance, power)
    )


def assert_projection(d: Decomposition, weight: Tensor) -> None:
    """`B A` is `Q Q^T W` for an orthonormal Q (or `W P P^T`), and Q is read from the factors themselves."""
    w, delta = weight.double(), d.B.double() @ d.A.double()
    if d.side == "output":
        live = d.B.double()[:, torch.linalg.vector_norm(d.B, dim=0) > 0]
        q = live / torch.linalg.vector_norm(live, dim=0)
        expected = q @ (q.mT @ w)
    else:
        q = (d.A.double() / torch.linalg.vector_norm(d.A.double(), dim=1, keepdim=True)).mT
        expected = (w @ q) @ q.mT
    torch.testing.assert_close(
        q.mT @ q, torch.eye(q.shape[1], dtype=torch.float64), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(delta, expected, atol=2e-6 * float(w.norm()), rtol=0)


@given(
    shape=st.sampled_from(SHAPES),
    rank=st.integers(1, 16),
    components=st.sampled_from(["smallest", "largest"]),
    power=st.sampled_from([0, 0.5, 1]),
    side=st.sampled_from(["output", "input"]),
    a_norm=st.sampled_from([None, 1.0, 10.0]),
    route=st.sampled_from(["exact", "fast"]),
    decades=st.floats(0, 4),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=150, deadline=None)
def test_any_member_of_the_family_is_the_optimal_projection(
    shape, rank, components, power, side, a_norm, route, decades, seed
):
    weight, covariance = anisotropic(*shape, decades=decades, seed=seed)
    d = decompose(
        weight,
        covariance,
        rank=rank,
        components=components,
        power=power,
        side=side,
        a_norm=a_norm,
        route=route,
        seed=seed,
    )
    assert d.B.shape == (shape[0], rank)
    assert d.A.shape == (rank, shape[1])
    assert d.B.dtype == d.A.dtype == torch.float32
    assert d.floored == 0
    assert_projection(d, weight)
    assert bool((d.singular_values.diff() <= 1e-12 * d.singular_values.max()).all()), "descending"
    damped = damp(covariance.double(), 1e-4)
    if side == "output" or power == 0:
        best = optimum(weight, damped, rank, components, power)
        assert energy(d, damped, power) == pytest.approx(best, rel=0.01)
        assert d.chosen_energy == pytest.approx(best, rel=0.01)
    if a_norm is not None:
        norms = torch.linalg.vector_norm(d.A, dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, a_norm), atol=0, rtol=1e-4)
    whole = float(torch.linalg.norm(weight.double() @ root(damped, power)))
    assert d.total_energy == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("shape", LARGE_SHAPES)
@pytest.mark.parametrize("components", ["smallest", "largest"])
@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_fast_route_reaches_the_optimum(shape, components, power):
    weight, covariance = anisotropic(*shape)
    damped = damp(covariance.double(), 1e-4)
    best = optimum(weight, damped, 8, components, power)
    for route in ("auto", "exact"):
        d = decompose(weight, covariance, rank=8, components=components, power=power, route=route)
        assert d.route == ("fast" if route == "auto" else "exact")
        assert (d.spectrum is None) == (d.route == "fast")
        assert energy(d, damped, power) == pytest.approx(best, rel=0.002)
        torch.testing.assert_close(
            float(torch.linalg.norm(d.singular_values)), best, rtol=0.002, atol=0
        )


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("route", ["exact", "fast"])
def test_smallest_components_survive_a_condition_number_beyond_the_squared_form(damping, route):
    """At σ_min/σ_max far under sqrt(eps), `eigh` of `G G^T` is noise there, and float32 everywhere."""
    weight, covariance = anisotropic(64, 64, decades=5)
    damped = damp(covariance.double(), damping)
    best = optimum(weight, damped, 8, "smallest")
    d = decompose(weight, covariance, rank=8, damping=damping, route=route)
    assert d.chosen_energy == pytest.approx(best, rel=0.01)
    # what is left is the rounding of the factors themselves to float32
    stored = 1e-7 * float(torch.linalg.norm(d.B @ d.A) * torch.linalg.norm(damped))
    assert energy(d, damped) == pytest.approx(best, rel=0.01, abs=stored)


@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_flat_spectrum_where_block_iteration_is_slowest(shape):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(*shape, generator=generator)
    x = torch.randn(4000, shape[1], generator=generator)
    covariance = x.mT @ x / len(x)
    damped = damp(covariance.double(), 1e-4)
    for components in ("smallest", "largest"):
        d = decompose(weight, covariance, rank=8, components=components, route="fast")
        assert energy(d, damped) == pytest.approx(optimum(weight, damped, 8, components), rel=0.01)


@given(seed=st.integers(0, 10_000), exponent=st.integers(-40, 40), shape=st.sampled_from(SHAPES))
@settings(max_examples=25, deadline=None)
def test_scale_of_the_covariance_does_not_change_the_adapter(seed, exponent, shape):
    factor = 2.0**exponent  # rounds nothing
    weight, covariance = anisotropic(*shape, seed=seed, decades=2)
    for components in ("smallest", "largest"):
        route = "fast" if seed % 2 else "exact"
        one = decompose(weight, covariance, rank=4, components=components, route=route)
        other = decompose(weight, covariance * factor, rank=4, components=components, route=route)
        torch.testing.assert_close(
            other.singular_values, one.singular_values * factor, rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            other.B @ other.A, one.B @ one.A, atol=1e-4 * float(weight.norm()), rtol=0
        )


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_norm_moves_scale_between_the_factors_and_leaves_the_product(side):
    weight, covariance = anisotropic(40, 24)
    paper = decompose(weight, covariance, rank=5, side=side)
    for g in (0.1, 1.0, 30.0):
        scaled = decompose(weight, covariance, rank=5, side=side, a_norm=g)
        torch.testing.assert_close(scaled.B @ scaled.A, paper.B @ paper.A, atol=1e-6, rtol=1e-4)
        norms = torch.linalg.vector_norm(scaled.A, dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, g), rtol=1e-5, atol=0)


def test_factors_are_the_papers():
    """`B = U Σ^1/2`, `A = Σ^1/2 V^T C'^-1` (CorDA, equation 6), with a C' that can be inverted."""
    weight, covariance = anisotropic(24, 24, decades=1, massive=False)
    damped = damp(covariance.double(), 1e-2)
    u, s, vt = torch.linalg.svd(weight.double() @ damped)
    for components, chosen in (("smallest", slice(20, 24)), ("largest", slice(0, 4))):
        d = decompose(weight, covariance, rank=4, components=components, damping=1e-2)
        signs = torch.sign((u[:, chosen] * d.B.double()).sum(0))
        b = u[:, chosen] * s[chosen].sqrt() * signs
        a = (s[chosen].sqrt() * signs)[:, None] * (vt[chosen] @ torch.linalg.inv(damped))
        torch.testing.assert_close(d.B.double(), b, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(d.A.double(), a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(d.singular_values, s[chosen], rtol=1e-6, atol=0)
        torch.testing.assert_close(d.spectrum, s, rtol=1e-6, atol=0)


def test_pissa_and_milora_need_no_data():
    weight, covariance = anisotropic(30, 20)
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    for components, chosen in (("largest", slice(0, 3)), ("smallest", slice(17, 20))):
        expected = (u[:, chosen] * s[chosen]) @ vt[chosen]
        for side in ("output", "input"):
            for c in (None, covariance):
                d = decompose(weight, c, rank=3, components=components, power=0, side=side)
                torch.testing.assert_close(
                    d.B.double() @ d.A.double(), expected, atol=1e-6, rtol=1e-5
                )


def test_input_side_sees_only_what_the_data_does_not_use():
    """LoRA-Null: A spans the smallest eigenvectors of C, so it is blind to the calibration inputs."""
    weight, covariance = anisotropic(64, 256, tokens=200)  # C has a null space
    blind = decompose(weight, covariance, rank=8, side="input", a_norm=1.0)
    seeing = decompose(weight, covariance, rank=8, side="output", a_norm=1.0)

    def seen(d: Decomposition) -> float:  # ‖A C^1/2‖
        a = d.A.double()
        return math.sqrt(float(((a @ covariance.double()) * a).sum()))

    assert seen(blind) < 0.01 * seen(seeing)
    for route in ("exact", "fast"):
        d = decompose(weight, covariance, rank=8, side="input", components="largest", route=route)
        values = torch.linalg.eigvalsh(damp(covariance.double(), 1e-4)).flip(0)
        torch.testing.assert_close(d.singular_values, values[:8], rtol=1e-4, atol=0)


@pytest.mark.parametrize("route", ["exact", "fast"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("a_norm", [None, 10.0])
def test_rank_deficient_weight(shape, route, a_norm):
    full, covariance = anisotropic(*shape)
    u, s, vt = torch.linalg.svd(full.double(), full_matrices=False)
    live = 10
    weight = ((u[:, :live] * s[:live]) @ vt[:live]).float()
    d = decompose(weight, covariance, rank=8, route=route, a_norm=a_norm)
    dead = min(shape) - live
    assert d.floored == min(dead, 8)
    assert torch.isfinite(d.A).all()
    assert torch.isfinite(d.B).all()
    delta = d.B.double() @ d.A.double()
    projected = u[:, :live] @ (u[:, :live].mT @ delta)
    torch.testing.assert_close(projected, delta, atol=1e-6, rtol=0)  # nothing outside what W has
    rows = torch.linalg.vector_norm(d.A, dim=1)
    assert float(rows.min()) > 1e-3 * float(rows.max()), (
        "a dead component gets a row that can learn"
    )
    assert int((torch.linalg.vector_norm(d.B, dim=0) == 0).sum()) == d.floored


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("route", ["exact", "fast"])
def test_zero_weight_starts_like_lora(shape, side, route):
    _, covariance = anisotropic(*shape)
    for components in ("smallest", "largest"):
        d = decompose(
            torch.zeros(shape), covariance, rank=4, components=components, side=side, route=route
        )
        assert d.floored == 4
        assert d.energy_share == 0
        assert torch.equal(d.B, torch.zeros_like(d.B))
        torch.testing.assert_close(d.A @ d.A.mT, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("route", ["exact", "fast"])
@pytest.mark.parametrize("power", [0.5, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_covariance_without_damping(shape, power, route):
    weight, covariance = anisotropic(*shape, tokens=6)  # rank 6
    for components in ("smallest", "largest"):
        d = decompose(
            weight, covariance, rank=4, components=components, power=power, damping=0, route=route
        )
        assert_projection(d, weight)
        best = optimum(weight, covariance, 4, components, power)
        scale = 1e-5 * d.total_energy  # the optimum itself is rounding error of C
        assert energy(d, covariance, power) == pytest.approx(best, rel=0.01, abs=scale)
        assert float(d.A.abs().max()) < 1e4, "a lost singular value must not blow A up"


def test_zero_covariance_gives_finite_factors():
    weight, _ = anisotropic(16, 16)
    d = decompose(weight, torch.zeros(16, 16), rank=4)
    assert d.floored == 4
    assert_projection(d, weight)


def test_full_rank_returns_the_weight():
    for shape in SHAPES:
        weight, covariance = anisotropic(*shape, decades=1)
        for side in ("output", "input") if shape[0] >= shape[1] else ("output",):
            d = decompose(weight, covariance, rank=min(shape), side=side)
            torch.testing.assert_close(d.B @ d.A, weight, atol=1e-5, rtol=1e-4)
            assert d.energy_share == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_as_precisely(dtype):
    weight, covariance = anisotropic(24, 24, decades=1)
    weight = weight.to(dtype)
    d = decompose(weight, covariance, rank=4)
    same = decompose(weight.float(), covariance, rank=4)
    assert d.B.dtype == torch.float32
    torch.testing.assert_close(d.B, same.B, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(d.A, same.A, rtol=1e-4, atol=1e-5)


def test_same_arguments_same_result_and_arguments_untouched():
    weight, covariance = anisotropic(280, 300)
    before = weight.clone(), covariance.clone()
    one = decompose(weight, covariance, rank=4)
    torch.randn(3)  # the global generator is not read
    two = decompose(weight, covariance, rank=4)
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B, two.B)
    assert torch.equal(weight, before[0])
    assert torch.equal(covariance, before[1])
    assert bool((one.B.gather(0, one.B.abs().argmax(0, keepdim=True)) > 0).all()), "signs are fixed"


def test_smallest_and_largest_energy_shares_bracket_every_other_subspace():
    weight, covariance = anisotropic(32, 48)
    damped = damp(covariance.double(), 1e-4)
    whole = float(torch.linalg.norm(weight.double() @ damped))
    low = decompose(weight, covariance, rank=4).energy_share
    high = decompose(weight, covariance, rank=4, components="largest").energy_share
    for seed in range(20):
        q = torch.linalg.qr(
            torch.randn(32, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ).Q
        share = (knowledge_energy((q, q.mT @ weight.double()), damped) / whole) ** 2
        assert low * 0.999 < share < high * 1.001


def test_damage_helpers_against_their_definitions():
    weight, covariance = anisotropic(20, 30)
    d = decompose(weight, covariance, rank=4, components="largest")
    delta = d.B.double() @ d.A.double()
    half = root(covariance, 0.5)
    expected = float((delta @ half).square().sum() / (weight.double() @ half).square().sum())
    assert relative_damage((d.B, d.A), weight, covariance) == pytest.approx(expected, rel=1e-5)
    assert knowledge_energy((d.B, d.A), covariance) == pytest.approx(
        float(torch.linalg.norm(delta @ covariance.double())), rel=1e-5
    )
    zero = torch.zeros_like(weight)
    assert relative_damage((d.B, torch.zeros_like(d.A)), zero, covariance) == 0.0


def test_damp_adds_a_share_of_the_mean_diagonal():
    covariance = torch.diag(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(damp(covariance, 0.5), torch.diag(torch.tensor([2.0, 4.0])))
    assert torch.equal(covariance, torch.diag(torch.tensor([1.0, 3.0])))


NAN = torch.full((8, 8), float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 7}, "rank 7 .* 6"),
        ({"rank": 0}, "rank 0"),
        ({"covariance": None}, "needs a covariance"),
        ({"covariance": torch.eye(6)}, r"\(6, 6\).*\(8, 8\)"),
        ({"covariance": torch.ones(8)}, r"\(8,\)"),
        ({"covariance": NAN}, "covariance holds NaN or Inf"),
        ({"covariance": -torch.eye(8)}, "not a second moment"),
        ({"weight": torch.full((6, 8), float("inf"))}, "weight holds NaN or Inf"),
        ({"weight": torch.ones(6, 8, dtype=torch.int8)}, "floating"),
        ({"weight": torch.ones(2, 6, 8)}, "matrix"),
        ({"weight": torch.ones(0, 8)}, "matrix"),
        ({"damping": -1.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"a_norm": 0.0}, "a_norm"),
    ],
)
def test_bad_input_is_named(change, message):
    weight, covariance = anisotropic(6, 8)
    arguments = {"weight": weight, "covariance": covariance, "rank": 2} | change
    with pytest.raises(CordaError, match=message):
        decompose(**arguments)


@pytest.mark.parametrize(
    "change", [{"components": "middle"}, {"side": "top"}, {"route": "slow"}, {"power": 2}]
)
def test_unknown_choices_are_listed(change):
    weight, covariance = anisotropic(6, 8)
    with pytest.raises(UnknownNameError, match="choose one of"):
        decompose(weight, covariance, rank=2, **change)
