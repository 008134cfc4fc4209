"""The ascent on a weight, as a function of what a probe says."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corda_vlm.train.budget.steering import RANGE, last_weight, next_weight, recent

kept = st.floats(-1.0, 1.5)
budgets = st.floats(0.01, 1.0)
weights = st.floats(1e-3, 1e3)


@given(weights, kept, budgets)
def test_it_rises_below_the_budget_falls_above_it_and_stays_on_it(weight, share, keep) -> None:
    after = next_weight(weight, weight, share, keep)
    assert (after > weight) == (share < keep) or after == pytest.approx(weight)
    assert weight / math.e * (1 - 1e-9) <= after <= weight * math.e * (1 + 1e-9)


@given(weights, st.lists(kept, max_size=40), budgets)
def test_it_stays_within_its_range(start, looks, keep) -> None:
    weight = start
    for share in looks:
        weight = next_weight(weight, start, share, keep)
    assert start / RANGE <= weight <= start * RANGE


def test_it_finds_the_weight_that_meets_the_budget() -> None:
    """Of a training that forgets the less the greater the weight, from both sides."""
    for start in (0.1, 100.0):
        weight = start
        for _ in range(30):
            weight = next_weight(weight, start, 1 - 0.2 / (1 + weight / 3), 0.95)
        assert 1 - 0.2 / (1 + weight / 3) == pytest.approx(0.95, abs=0.005)


def test_a_budget_of_all_is_no_division_by_zero() -> None:
    assert next_weight(1.0, 1.0, 0.99, 1.0) == pytest.approx(math.exp(0.5))


def test_the_last_weight_is_read_from_the_log() -> None:
    log = [{"loss": 1.0}, {"keep_weight": 3.0}, {"keep_weight": 5.0}, {"loss": 0.5}]
    assert last_weight(log, 1.0) == 5.0
    assert last_weight([{"loss": 1.0}], 2.0) == 2.0


def test_a_stop_looks_at_the_last_look_of_each_part() -> None:
    log = [{"keep": 0.1}, {"loss": 1.0}, {"keep": 0.9}, {"keep": 0.8}]
    assert recent(log, 2) == pytest.approx(0.85)
    assert recent(log, 8) == pytest.approx(0.6)
