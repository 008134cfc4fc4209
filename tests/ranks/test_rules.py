"""Each rule against its formula, what all of them have in common, and rules of one's own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import corda_vlm
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.ranks import RANK_RULES, RankRule, SiteView, share_out, uniform_budget

names = sorted(RANK_RULES)
modes = st.sampled_from(["kpm", "ipm"])


@st.composite
def descending(draw, full: int) -> torch.Tensor:
    values = draw(st.lists(st.integers(0, 12), min_size=full, max_size=full))
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


@st.composite
def problems(draw) -> tuple[dict[str, SiteView], int]:
    """Sites, zeros and ties included, and a budget that can be met."""
    views = {}
    for name in draw(st.permutations([f"block.{i}.fc" for i in range(draw(st.integers(1, 5)))])):
        shape = draw(st.tuples(st.integers(2, 8), st.integers(2, 8)))
        views[name] = SiteView(
            shape,
            spectrum=draw(descending(min(shape))),
            log_compactness=draw(st.sampled_from([0.5, 2.0, 10.0])),
            gradient=draw(descending(min(shape))),
            output_energy=draw(st.sampled_from([None, 0.25, 1.0, 64.0])),
            task_energy=draw(st.sampled_from([0.0, 0.25, 1.0, 9.0])),
        )
    shapes = {name: view.shape for name, view in views.items()}
    most = sum(view.price * (view.full - 1) for view in views.values())
    return views, draw(st.integers(uniform_budget(shapes, 1), most))


def spent(views: dict[str, SiteView], ranks: dict[str, int]) -> int:
    return sum(views[site].price * rank for site, rank in ranks.items())


@pytest.mark.parametrize("rule", names)
@given(problem=problems(), mode=modes, data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_budget_is_kept_and_used_whatever_the_order_and_more_of_it_takes_no_rank(
    rule, problem, mode, data
):
    views, budget = problem
    ranks = share_out(views, rule=rule, mode=mode, budget=budget)
    assert list(ranks) == list(views)
    assert all(1 <= rank < views[site].full for site, rank in ranks.items())
    left = budget - spent(views, ranks)
    assert left >= 0
    if any(rank < views[site].full - 1 for site, rank in ranks.items()):
        assert left < max(view.price for view in views.values())
    order = data.draw(st.permutations(list(views)))
    turned = share_out({s: views[s] for s in order}, rule=rule, mode=mode, budget=budget)
    assert turned == ranks
    least = sum(view.price for view in views.values())
    less = share_out(views, rule=rule, mode=mode, budget=data.draw(st.integers(least, budget)))
    assert all(less[site] <= ranks[site] for site in views)


@pytest.mark.parametrize("rule", names)
@given(problem=problems(), mode=modes, power=st.integers(-20, 20))
@settings(max_examples=40, deadline=None)
def test_the_unit_of_what_is_measured_does_not_matter(rule, problem, mode, power):
    """Of spectra each site's own (its covariance may have any scale), of what the task says the same for all sites."""
    views, budget = problem
    unit = 2.0**power
    scaled = {
        site: replace(
            view,
            spectrum=view.spectrum * unit * 2.0 ** (len(site) + i),
            gradient=view.gradient * unit,
            output_energy=(view.output_energy or 1.0) * unit,
            task_energy=view.task_energy * unit * unit,
        )
        for i, (site, view) in enumerate(views.items())
    }
    assert share_out(scaled, rule=rule, mode=mode, budget=budget) == share_out(
        views, rule=rule, mode=mode, budget=budget
    )


@given(problems())
@settings(max_examples=60, deadline=None)
def test_the_gradients_ranks_gain_as_much_as_any_of_the_same_steps(problem):
    """No site could give its last rank to another and gain by it, rank for rank of equal price."""
    views, budget = problem
    views = {
        s: SiteView((8, 8), gradient=_padded(v.gradient), output_energy=v.output_energy)
        for s, v in views.items()
    }
    budget = max(16 * len(views), min(budget, 16 * 7 * len(views)))
    ranks = share_out(views, rule="gradient", mode="kpm", budget=budget)

    def gain(site: str, index: int) -> float:
        return float(views[site].gradient[index] ** 2 * (views[site].output_energy or 1.0))

    given_up = [gain(s, r - 1) for s, r in ranks.items() if r > 1]
    left = [gain(s, r) for s, r in ranks.items() if r < 7]
    assert not given_up or not left or min(given_up) >= max(left)


def _padded(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values, values.new_zeros(8 - len(values))])


def test_energy_takes_what_risks_least_for_each_parameter():
    flat, steep = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([8.0, 4.0, 0.2, 0.1])
    views = {"flat": SiteView((4, 4), flat), "steep": SiteView((4, 4), steep)}
    assert share_out(views, rule="energy", mode="kpm", budget=32) == {"flat": 1, "steep": 3}
    assert share_out(views, rule="energy", mode="ipm", budget=32) == {"flat": 3, "steep": 1}
    # the same energies, but a rank of one site costs more parameters
    views = {"dear": SiteView((4, 40), flat), "cheap": SiteView((4, 4), flat)}
    assert share_out(views, rule="energy", mode="ipm", budget=140) == {"dear": 2, "cheap": 3}


def test_the_task_gets_ranks_in_proportion_to_its_energy_for_each_parameter():
    views = {f"s{i}": SiteView((40, 40), task_energy=e) for i, e in enumerate((1.0, 2.0, 5.0))}
    for mode in ("kpm", "ipm"):
        assert share_out(views, rule="task", mode=mode, budget=80 * 24) == {
            "s0": 3,
            "s1": 6,
            "s2": 15,
        }
    views["s0"] = replace(views["s0"], task_energy=float("nan"))
    with pytest.raises(CordaError, match="'s0': its task_energy is nan"):
        share_out(views, rule="task", mode="kpm", budget=1000)


def test_the_gradient_is_weighed_by_what_the_layer_gives_out_on_the_knowledge():
    s = torch.tensor([4.0, 3.0, 2.0, 1.0])
    views = {"a": SiteView((4, 4), gradient=s), "b": SiteView((4, 4), gradient=s)}
    assert share_out(views, rule="gradient", mode="kpm", budget=32) == {"a": 2, "b": 2}
    views["b"] = replace(views["b"], output_energy=16.0)
    assert share_out(views, rule="gradient", mode="kpm", budget=32) == {"a": 1, "b": 3}


def test_of_a_gradient_as_many_values_are_enough_as_there_may_be_ranks():
    views = {s: SiteView((8, 8), gradient=torch.tensor([3.0, 2.0, 1.0])) for s in "ab"}
    ranks = share_out(views, rule="gradient", mode="kpm", budget=5 * 16, max_rank=3)
    assert ranks == {"a": 3, "b": 2}
    with pytest.raises(CordaError, match="'a': 3 singular values, but the full rank is 8"):
        share_out(views, rule="gradient", mode="kpm", budget=5 * 16, max_rank=4)


@pytest.mark.parametrize("rule", names)
def test_a_view_without_what_the_rule_needs_is_refused(rule):
    needs = {*RANK_RULES[rule].needs} - {"output_energy"}
    assert needs
    with pytest.raises(CordaError, match=rf"'a': rank rule '{rule}' needs its ({'|'.join(needs)})"):
        share_out({"a": SiteView((4, 4))}, rule=rule, mode="kpm", budget=16)


@pytest.fixture
def own_rule():
    def register(score, **more):
        rule = RankRule(score, ("gradient",), **more)
        return corda_vlm.register_rank_rule("own", rule)

    yield register
    RANK_RULES.pop("own", None)


def test_a_rule_of_ones_own(own_rule):
    s = torch.tensor([4.0, 3.0, 2.0, 1.0])
    views = {"a": SiteView((4, 4), gradient=s), "b": SiteView((4, 4), gradient=2 * s)}
    with pytest.raises(UnknownNameError, match="rank rule 'own'; choose one of: compactness"):
        share_out(views, rule="own", mode="kpm", budget=32)
    rule = own_rule(lambda site, rank: site.gradient[rank].reciprocal(), grows=True)
    assert rule.of_task
    assert share_out(views, rule="own", mode="ipm", budget=32) == {"a": 1, "b": 3}
    with pytest.raises(CordaError, match="'own' is registered already"):
        own_rule(lambda site, rank: rank)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda _, rank: -rank, "'a': the scores of rank rule 'own' fall as r grows"),
        (lambda _, rank: rank[:1], r"'a': .*shape \(1,\) for 2 steps"),
        (lambda _, rank: rank * float("nan"), "'a': .* or NaN"),
    ],
)
def test_scores_that_cannot_be_followed_are_refused(own_rule, score, message):
    own_rule(score, grows=True)
    views = {"a": SiteView((4, 4), gradient=torch.tensor([4.0, 3.0, 2.0, 1.0]))}
    with pytest.raises(CordaError, match=message):
        share_out(views, rule="own", mode="kpm", budget=16)


def test_to_register_a_rule_takes_no_pytorch():
    code = (
        "import sys\nfrom corda_vlm import register_rank_rule\nfrom corda_vlm.ranks import RankRule\n"
        "register_rank_rule('own', RankRule(max, ('gradient',)))\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
