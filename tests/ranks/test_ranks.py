"""The rules of ranks/ against the literal loops of CorDA++, its invariants, and what it refuses."""

from __future__ import annotations

import gc
import math
import time
import weakref
from functools import partial
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corda_vlm import ranks
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.ranks import (
    allocate_ranks,
    check_budget,
    selection_score,
    uniform_budget,
)

compactness = partial(ranks.compactness, damping=1e-4)
spectrum = partial(ranks.spectrum, damping=1e-4)
select_covariance = partial(ranks.select_covariance, damping=1e-4)


def second_moment(d: int, seed: int, decay: float = 1.0) -> torch.Tensor:
    """A covariance (d, d) of anisotropic data; its k-th axis has the standard deviation k^-decay."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    x = torch.randn(8 * d, d, generator=generator, dtype=torch.float64) * scale
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    x = x @ turn
    return x.T @ x / len(x)


# --- the paper, literally ---------------------------------------------------------------------------


def score(log_pi: float, sigma: list[float], r: int) -> float:
    """`log π · σ₋ᵣ / Σ_{k=1..R−r} σ_k`; the sums in sequence, as the integers below make them exact."""
    below = [0.0, *accumulate(sigma)][len(sigma) - r]
    return log_pi * (sigma[len(sigma) - r] / below) if below > 0 else 0.0


def literal(spectra, pi, shapes, budget, mode, floor, ceiling) -> dict[str, int]:
    """One rank at a time; KPM undoes the step by which the paper goes over the budget."""
    full = {site: min(shape) for site, shape in shapes.items()}
    top = {site: min(ceiling[site], full[site] - 1) for site in full}
    kpm = mode == "kpm"
    start = {site: floor[site] if kpm else full[site] - top[site] for site in full}
    end = {site: top[site] if kpm else full[site] - floor[site] for site in full}
    r = dict(start)

    def adapter(site: str) -> int:
        return r[site] if kpm else full[site] - r[site]

    def spent() -> int:
        return sum(sum(shapes[site]) * adapter(site) for site in full)

    while kpm or spent() > budget:
        open_ = [site for site in sorted(full) if r[site] < end[site]]
        if not open_:
            break
        chosen = min(
            open_, key=lambda site: score(math.log(pi[site]), spectra[site].tolist(), r[site])
        )
        r[chosen] += 1
        if kpm and spent() > budget:
            r[chosen] -= 1
            break
    return {site: adapter(site) for site in full}


@st.composite
def problems(draw, bounded: bool = True):
    """Sites with small integer spectra (zeros and ties included), and a budget that can be met."""
    names = draw(st.permutations([f"block.{i}.fc" for i in range(draw(st.integers(1, 6)))]))
    spectra, pi, shapes, floor, ceiling = {}, {}, {}, {}, {}
    for name in names:
        shape = draw(st.tuples(st.integers(2, 9), st.integers(2, 9)))
        full = min(shape)
        values = draw(st.lists(st.integers(0, 12), min_size=full, max_size=full))
        spectra[name] = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
        pi[name] = draw(st.sampled_from([1.5, 2.0, 100.0, 1e6]))
        shapes[name] = shape
        floor[name] = draw(st.integers(1, full - 1)) if bounded else 1
        ceiling[name] = draw(st.integers(floor[name], full + 2)) if bounded else full
    price = {name: sum(shapes[name]) for name in names}
    least = sum(price[name] * floor[name] for name in names)
    most = sum(price[name] * min(ceiling[name], min(shapes[name]) - 1) for name in names)
    return spectra, pi, shapes, draw(st.integers(least, most)), floor, ceiling


modes = st.sampled_from(["kpm", "ipm"])


@given(problems(), modes)
@settings(max_examples=300, deadline=None)
def test_the_greedy_allocation_is_the_papers(problem, mode):
    spectra, pi, shapes, budget, floor, ceiling = problem
    given_ = allocate_ranks(
        spectra, pi, shapes, mode=mode, budget=budget, min_rank=floor, max_rank=ceiling
    )
    assert given_ == literal(spectra, pi, shapes, budget, mode, floor, ceiling)
    assert list(given_) == list(spectra)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_real_spectra_give_the_papers_allocation(mode):
    shapes = {
        "attn.q": (24, 24),
        "attn.o": (24, 24),
        "fc1": (48, 24),
        "fc2": (24, 48),
        "head": (10, 24),
    }
    spectra, pi = {}, {}
    for seed, (site, (out, inp)) in enumerate(shapes.items()):
        covariance = second_moment(inp, seed, decay=0.3 * seed)
        spectra[site] = torch.linalg.svdvals(
            torch.randn(out, inp, dtype=torch.float64) @ covariance
        )
        pi[site] = compactness(covariance, out)
    everywhere = dict.fromkeys(shapes, 1)
    budget = uniform_budget(shapes, 5)
    given_ = allocate_ranks(spectra, pi, shapes, mode=mode, uniform_rank=5)
    full = {site: min(shape) for site, shape in shapes.items()}
    assert given_ == literal(spectra, pi, shapes, budget, mode, everywhere, full)
    assert len(set(given_.values())) > 1


@given(problems(), modes)
@settings(max_examples=200, deadline=None)
def test_ranks_stay_within_bounds_and_the_budget_is_kept_and_used(problem, mode):
    spectra, pi, shapes, budget, floor, ceiling = problem
    ranks = allocate_ranks(
        spectra, pi, shapes, mode=mode, budget=budget, min_rank=floor, max_rank=ceiling
    )
    full = {site: min(shape) for site, shape in shapes.items()}
    assert all(floor[s] <= ranks[s] <= min(ceiling[s], full[s] - 1) for s in full)
    unspent = budget - sum(sum(shapes[site]) * rank for site, rank in ranks.items())
    assert unspent >= 0
    if any(ranks[s] < min(ceiling[s], full[s] - 1) for s in full):
        assert unspent < max(map(sum, shapes.values()))


@given(problems(bounded=False), modes, st.data())
@settings(max_examples=100, deadline=None)
def test_a_larger_budget_never_takes_a_rank_away(problem, mode, data):
    spectra, pi, shapes, budget, _, _ = problem
    smaller = data.draw(st.integers(uniform_budget(shapes, 1), budget))
    more = allocate_ranks(spectra, pi, shapes, mode=mode, budget=budget)
    less = allocate_ranks(spectra, pi, shapes, mode=mode, budget=smaller)
    assert all(less[site] <= more[site] for site in shapes)


@given(problems(bounded=False), modes, st.data())
@settings(max_examples=100, deadline=None)
def test_neither_the_order_of_the_sites_nor_the_scale_of_a_spectrum_matters(problem, mode, data):
    spectra, pi, shapes, budget, _, _ = problem
    order = data.draw(st.permutations(list(spectra)))
    scaled = {site: spectra[site] * 2.0 ** data.draw(st.integers(-30, 30)) for site in order}
    assert allocate_ranks(scaled, pi, shapes, mode=mode, budget=budget) == allocate_ranks(
        spectra, pi, shapes, mode=mode, budget=budget
    )


def test_covariances_of_another_scale_give_the_same_ranks():
    shapes = {"a": (12, 16), "b": (16, 12), "c": (12, 12)}
    weights = {site: torch.randn(*shape, dtype=torch.float64) for site, shape in shapes.items()}

    def ranks(factor: float) -> dict[str, int]:
        covariances = {
            site: factor ** (i + 1) * second_moment(inp, i, 0.4 * i)
            for i, (site, (_, inp)) in enumerate(shapes.items())
        }
        return allocate_ranks(
            {site: torch.linalg.svdvals(weights[site] @ covariances[site]) for site in shapes},
            {site: compactness(covariances[site], shapes[site][0]) for site in shapes},
            shapes,
            uniform_rank=4,
        )

    assert ranks(1.0) == ranks(7.3) == ranks(1e-5)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_three_hundred_sites_and_a_million_steps_take_seconds(mode):
    """The 301 sites of a language model of 43 blocks: 1.2 million steps in one direction or the other."""
    generator = torch.Generator().manual_seed(0)
    roles = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
             "gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}  # fmt: skip
    shapes = {f"layers.{i}.{role}": roles[role] for i in range(43) for role in roles}
    spectra = {
        site: torch.rand(4096, generator=generator).sort(descending=True).values for site in shapes
    }
    pi = {site: 1e3 + i for i, site in enumerate(shapes)}
    began = time.process_time()
    ranks = allocate_ranks(spectra, pi, shapes, mode=mode, uniform_rank=128)
    assert time.process_time() - began < 10
    budget = uniform_budget(shapes, 128)
    spent = sum(sum(shapes[site]) * rank for site, rank in ranks.items())
    assert budget - 15104 < spent <= budget


@given(problems(), st.data())
@settings(max_examples=50, deadline=None)
def test_what_cannot_be_shared_out_is_known_without_any_covariance(problem, data):
    _, _, shapes, budget, floor, ceiling = problem
    bounds = check_budget(shapes, budget, min_rank=floor, max_rank=ceiling)
    assert all(1 <= low <= high < min(shapes[site]) for site, (low, high) in bounds.items())
    for off, end in ((-1, 0), (1, 1)):
        edge = sum(sum(shapes[site]) * bound[end] for site, bound in bounds.items())
        check_budget(shapes, edge, min_rank=floor, max_rank=ceiling)
        with pytest.raises(CordaError, match=f"budget of {edge + off:,} parameters is too"):
            check_budget(shapes, edge + off, min_rank=floor, max_rank=ceiling)


# --- what the rule means ----------------------------------------------------------------------------


def test_the_site_whose_tail_matters_less_gives_more_of_it_up():
    steep, flat = 0.3 ** torch.arange(8.0), torch.ones(8)
    sites = (
        {"steep": steep, "flat": flat},
        {"steep": 50.0, "flat": 50.0},
        {"steep": (8, 8), "flat": (8, 8)},
    )
    kpm = allocate_ranks(*sites, mode="kpm", uniform_rank=4)
    ipm = allocate_ranks(*sites, mode="ipm", uniform_rank=4)
    assert kpm == {"steep": 7, "flat": 1}  # adapted: the tail
    assert ipm == {"steep": 1, "flat": 7}  # adapted: what the tail leaves


def test_a_less_compact_site_is_spared():
    spectra = {site: torch.linspace(2, 1, 8) for site in ("compact", "loose")}
    shapes = dict.fromkeys(spectra, (8, 8))
    kpm = allocate_ranks(spectra, {"compact": 10.0, "loose": 1e5}, shapes, uniform_rank=3)
    assert kpm["compact"] > kpm["loose"]


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_equal_sites_of_equal_price_meet_the_budget_exactly_and_ties_go_by_name(mode):
    names = [f"s{i}" for i in range(4)]
    spectra = {name: torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5]) for name in names}
    pi, shapes = dict.fromkeys(names, 9.0), dict.fromkeys(names, (5, 7))
    assert set(allocate_ranks(spectra, pi, shapes, mode=mode, uniform_rank=3).values()) == {3}
    ranks = allocate_ranks(spectra, pi, shapes, mode=mode, budget=12 * 10)
    first, last = (3, 2) if mode == "kpm" else (2, 3)
    assert ranks == {"s0": first, "s1": first, "s2": last, "s3": last}


def test_a_step_that_does_not_fit_ends_the_allocation():
    spectra = {"dear": 0.1 ** torch.arange(4.0), "cheap": torch.ones(4)}
    shapes = {"dear": (4, 96), "cheap": (4, 4)}
    ranks = allocate_ranks(spectra, {"dear": 9.0, "cheap": 9.0}, shapes, budget=100 + 8 + 99)
    assert ranks == {"dear": 1, "cheap": 1}


def test_components_that_carry_nothing_are_filtered_first():
    dead, alive = torch.tensor([1.0, 0, 0, 0, 0]), torch.tensor([5.0, 4, 3, 2, 1])
    pi, shapes = {"dead": 1e6, "alive": 2.0}, {"dead": (5, 5), "alive": (5, 5)}
    spectra = {"dead": dead, "alive": alive}
    assert allocate_ranks(spectra, pi, shapes, budget=60) == {"dead": 4, "alive": 2}
    assert allocate_ranks(spectra, pi, shapes, mode="ipm", budget=50) == {"dead": 1, "alive": 4}
    nothing = {"dead": torch.zeros(5), "alive": alive}
    assert allocate_ranks(nothing, pi, shapes, budget=60) == {"dead": 4, "alive": 2}


# --- spectra, compactness and selection ----------------------------------------------------------------------


def test_compactness_is_its_formula_and_does_not_depend_on_the_scale():
    covariance = second_moment(12, seed=1)
    normal = covariance / covariance.diagonal().mean()
    eigenvalues = torch.linalg.eigvalsh(normal)
    expected = math.sqrt(7 * float(eigenvalues[-1])) / float(eigenvalues[0])
    assert compactness(covariance, 7, damping=0.0) == pytest.approx(expected)
    damped = normal + 0.3 * torch.eye(12, dtype=torch.float64)
    assert compactness(covariance, 7, damping=0.3) == pytest.approx(
        compactness(damped, 7, damping=0.0)
    )
    for factor in (1e-12, 3.0, 1e9):
        assert compactness(factor * covariance, 7) == pytest.approx(compactness(covariance, 7))


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 99), st.floats(0, 3))
@settings(max_examples=50, deadline=None)
def test_compactness_is_least_for_white_inputs(d, out, seed, decay):
    white = compactness(5 * torch.eye(d), out)
    assert white == pytest.approx(math.sqrt(out))
    assert compactness(second_moment(d, seed, decay), out) >= white * (1 - 1e-12)


def test_dropping_a_component_changes_the_output_by_no_more_than_compactness_says():
    covariance = second_moment(10, seed=3)
    covariance /= covariance.diagonal().mean()
    weight = torch.randn(6, 10, dtype=torch.float64)
    u, sigma, _ = torch.linalg.svd(weight @ covariance)
    root = torch.linalg.cholesky(covariance)  # root-mean-square outputs: ‖ΔW C^½‖_F
    for r in range(1, 7):
        dropped = torch.outer(u[:, 6 - r], u[:, 6 - r] @ weight)
        bound = compactness(covariance, 6, damping=0.0) * sigma[6 - r]
        assert torch.linalg.norm(dropped @ root) <= bound


def test_a_singular_covariance_needs_damping():
    x = torch.randn(5, 12)
    singular = x.T @ x / 5  # float32: its null space rounds to either side of zero
    assert 1e3 < compactness(singular, 8) < 1e6
    assert compactness(singular, 8, damping=1e-2) < compactness(singular, 8)
    rounded = torch.diag(torch.tensor([2.0, 1.0, -2e-4]))  # further below zero than the damping
    assert compactness(rounded, 8) == pytest.approx(4 / 1e-4, rel=1e-3)
    with pytest.raises(CordaError, match=r"singular.*positive damping"):
        compactness(torch.ones(4, 4), 8, damping=0.0)


def test_the_smallest_singular_values_are_not_lost_in_the_square():
    steep = torch.diag(10.0 ** -torch.arange(0, 12, dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    expected = torch.linalg.svdvals(turn @ steep) * 12 / steep.trace()
    found = spectrum(turn, steep, damping=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert spectrum(torch.randn(5, 12), steep).shape == (5,)
    assert spectrum(torch.randn(20, 12, dtype=torch.bfloat16), steep.float()).shape == (12,)


def test_the_selection_score_is_its_formula():
    sigma = torch.tensor([4.0, 2.0, 1.0, 1.0])
    assert selection_score(sigma, 10.0) == pytest.approx(math.log(10) * 8 / 4)
    assert selection_score(sigma, 10.0, rank=3) == pytest.approx(math.log(10) * 4 / 4)
    assert selection_score(torch.zeros(3), 10.0) == 0.0
    for rank in (0, 5):
        with pytest.raises(CordaError, match=f"rank {rank} is outside 1 to 4"):
            selection_score(sigma, 10.0, rank=rank)


def test_each_site_takes_the_candidate_of_the_lowest_score_and_scale_does_not_decide():
    weight = torch.randn(9, 12)
    candidates = [second_moment(12, seed, decay) for seed, decay in enumerate((0.0, 0.5, 1.0))]
    wider = torch.randn(30, 12)
    selected = select_covariance(candidates, {"q": weight, "k": wider})
    assert selected["k"].scores == select_covariance(candidates, {"k": wider})["k"].scores
    index, scores = selected["q"].index, selected["q"].scores
    assert selected["q"].compactness == pytest.approx(compactness(candidates[index], 9))
    torch.testing.assert_close(
        selected["q"].spectrum, spectrum(weight, candidates[index]), rtol=0, atol=0
    )
    for candidate, found in zip(candidates, scores, strict=True):
        normal = candidate / candidate.diagonal().mean()
        damped = normal + 1e-4 * torch.eye(12, dtype=torch.float64)
        sigma = torch.linalg.svdvals(weight.double() @ damped)
        low_high = torch.linalg.eigvalsh(damped / (1 + 1e-4))[[0, -1]]
        pi = math.sqrt(9 * float(low_high[1])) / float(low_high[0])
        assert found == pytest.approx(math.log(pi) * float(sigma.sum() / sigma[0]))
    assert scores[index] == min(scores)
    # Without normalisation a large scale would turn log π negative, and the choice round.
    rescaled = [c * factor for c, factor in zip(candidates, (1e12, 1e-9, 1e6), strict=True)]
    again = select_covariance(rescaled, {"q": weight})["q"]
    assert again.index == index
    assert again.scores == pytest.approx(scores)


def test_one_candidate_is_held_at_a_time():
    alive: list[weakref.ref] = []

    def candidates():
        for seed in range(4):
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1  # the one the loop still names
            made = second_moment(6, seed)
            alive.append(weakref.ref(made))
            yield made

    select_covariance(candidates(), {"a": torch.eye(6), "b": torch.ones(2, 6)})
    assert len(alive) == 4


def test_the_first_of_equal_candidates_is_taken():
    one, two = second_moment(6, 0, 2.0), second_moment(6, 1, 0.1)
    site = {"a": torch.eye(6)}
    better, worse = sorted((one, two), key=lambda c: select_covariance([c], site)["a"].scores[0])
    assert select_covariance([worse, better, better.clone()], site)["a"].index == 1


# --- what is refused --------------------------------------------------------------------------------

OK = {
    "spectra": {"a": torch.tensor([3.0, 2.0, 1.0]), "b": torch.tensor([3.0, 2.0, 1.0, 0.5])},
    "compactness": {"a": 5.0, "b": 6.0},
    "shapes": {"a": (3, 5), "b": (6, 4)},
    "budget": 30,
}


def changed(what: str, **sites: object) -> dict:
    return {what: {**OK[what], **sites}}


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 17}, r"17 parameters is too small for 2 sites: one rank a site takes 18.*Give at least"),
        ({"budget": 47}, r"47 parameters is too large for 2 sites: full rank less 1 everywhere takes 46"),
        ({"min_rank": 2, "budget": 35}, r"35 parameters is too small.*\(min_rank, up to 2\) takes 36"),
        ({"max_rank": {"b": 2}, "budget": 37}, r"37 parameters is too large.*ceilings \(max_rank\) takes 36.*raise"),
        ({"budget": None}, "either budget .* or uniform_rank"),
        ({"uniform_rank": 1}, "not both"),
        ({"budget": None, "uniform_rank": 4}, r"'a': rank 4 is outside 1 to 3, .*\(3, 5\)"),
        ({"budget": None, "uniform_rank": 0}, "rank 0 is outside 1 to 3"),
        ({"min_rank": 3}, r"'a': no rank lies between its floor 3 \(min_rank\) and its ceiling 2"),
        ({"min_rank": {"b": 3}, "max_rank": 2}, "'b': .* floor 3 .* ceiling 2 .*change them"),
        ({"min_rank": 0}, "floor 0"),
        ({"max_rank": {"a": 0}}, "'a': .* floor 1 .* ceiling 0"),
        (changed("spectra", a=torch.tensor([1.0, 2.0, 1.0])), "'a': singular value 2 of 3 is 2, after 1"),
        (changed("spectra", b=torch.tensor([2.0, 1, math.nan, 0])), "'b': singular value 3 of 4 is nan"),
        (changed("spectra", b=torch.tensor([math.inf, 1, 1, 0])), "'b': singular value 1 of 4 is inf"),
        (changed("spectra", a=torch.tensor([2.0, 1, -1])), "'a': singular value 3 of 3 is -1"),
        (changed("spectra", b=torch.ones(2)), "'b': 2 singular values, but the full rank is 4.*exact"),
        (changed("compactness", a=0.2), "'a': its compactness 0.2 is not"),
        (changed("compactness", a=math.inf), "'a': its compactness inf is not"),
        (changed("spectra", c=torch.ones(2)), "'c' has a spectrum but no compactness"),
        ({"spectra": {}, "compactness": {}, "shapes": {}}, "no sites"),
        ({**changed("spectra", a=torch.ones(1)), **changed("shapes", a=(1, 5))}, "'a': no rank lies"),
    ],
)  # fmt: skip
def test_bad_requests_name_the_site_the_numbers_and_the_remedy(mode, change, message):
    with pytest.raises(CordaError, match=message):
        allocate_ranks(**{**OK, "mode": mode, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("shapes", c=(4, 4)), "unknown site in shapes 'c'; choose one of: a, b"),
        (changed("compactness", c=4.0), "unknown site in compactness 'c'"),
        ({"min_rank": {"A": 1}}, "unknown site in min_rank 'A'"),
        ({"max_rank": {"bb": 1}}, "unknown site in max_rank 'bb'"),
        ({"rule": "compact"}, "unknown rank rule 'compact'; choose one of: compactness"),
        ({"mode": "kmp"}, "unknown mode 'kmp'; choose one of: ipm, kpm. Did you mean 'kpm'"),
    ],
)
def test_unknown_names_list_the_choices(change, message):
    with pytest.raises(UnknownNameError, match=message):
        allocate_ranks(**{**OK, **change})


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (torch.zeros(3, 3), "zero, NaN or Inf"),
        (torch.full((3, 3), math.nan), "zero, NaN or Inf"),
        (torch.tensor([[1.0, math.inf], [math.inf, 1.0]]), "zero, NaN or Inf"),
        (torch.diag(torch.tensor([2.0, 1.0, -1.0])), "eigenvalues from -1.5 .* no second moment"),
    ],
)
def test_what_is_no_covariance_is_refused_and_the_candidate_named(covariance, message):
    with pytest.raises(CordaError, match=message):
        compactness(covariance, 4)
    d = len(covariance)
    with pytest.raises(CordaError, match=rf"candidate 1 \(from 0\): .*{message}"):
        select_covariance([torch.eye(d), covariance], {"a": torch.ones(2, d)})


def test_no_candidates_is_refused():
    with pytest.raises(CordaError, match="at least one round"):
        select_covariance([], {"a": torch.eye(3)})
