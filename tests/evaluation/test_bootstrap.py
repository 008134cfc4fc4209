"""Intervals: means over examples, classes and weights, and that they cover the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corda_vlm.errors import DataError
from corda_vlm.evaluation.bootstrap import bootstrap, paired_difference
from corda_vlm.evaluation.scores import Outcome


def test_a_weighted_score_is_over_tokens() -> None:
    """Two documents: 30 tokens at ln 1/2 and 10 at ln 1/8 have the mean (30 + 3 · 10)/40 · ln 1/2."""
    values, weights = np.log([0.5, 0.125]), np.array([30.0, 10.0])
    score = Outcome("perplexity", -values, weights=weights, exp=True).score("t", "retention")
    assert score.value == pytest.approx(2**1.5)
    assert score.low == pytest.approx(2)
    assert score.high == pytest.approx(8)
    assert score.n == 2


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.floats(0.1, 9))
def test_equal_weights_change_nothing(values: list[float], weight: float) -> None:
    plain = bootstrap(np.array(values), resamples=50)
    weighted = bootstrap(np.array(values), weights=np.full(len(values), weight), resamples=50)
    assert weighted.value == pytest.approx(plain.value, abs=1e-9)
    assert weighted.low == pytest.approx(plain.low, abs=1e-9)


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(DataError, match="finite and above 0"):
        bootstrap(np.ones(2), weights=np.array([1.0, weight]))


def test_accuracy_of_a_hand_worked_vector() -> None:
    interval = bootstrap(np.array([1, 0, 1, 1]))
    assert interval.value == 0.75
    # Four draws of a coin of 3/4: below 1/4 with probability 0.004, all four right with 0.32.
    assert (interval.low, interval.high) == (0.25, 1.0)


def test_mean_per_class_counts_classes_equally() -> None:
    # Class 0: 3 of 4 right; class 1: 0 of 1. Over examples 0.6, over classes (0.75 + 0) / 2.
    values, groups = np.array([1, 1, 1, 0, 0]), np.array([0, 0, 0, 0, 7])
    assert bootstrap(values).value == pytest.approx(0.6)
    interval = bootstrap(values, groups)
    assert interval.value == pytest.approx(0.375)
    # Resamples without the only example of class 7 rest on class 0 alone, and so can reach 1.
    assert interval.high == pytest.approx(1.0)


def test_all_right_has_no_spread() -> None:
    interval = bootstrap(np.ones(50))
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_a_seed_repeats_and_matches_drawing_indices() -> None:
    generator = np.random.default_rng(3)
    values = generator.random(200)
    first, second = bootstrap(values, seed=1), bootstrap(values, seed=1)
    assert first == second
    drawn = values[generator.integers(0, 200, size=(4000, 200))].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert first.low == pytest.approx(low, abs=0.005)
    assert first.high == pytest.approx(high, abs=0.005)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    truth, covered = 0.3, 0
    for seed in range(200):
        interval = bootstrap(generator.random(300) < truth, resamples=500, seed=seed)
        covered += interval.low <= truth <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


@given(
    st.lists(st.booleans(), min_size=1, max_size=60),
    st.integers(min_value=1, max_value=5),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_the_value_lies_within_its_interval_of_shares(
    right: list[bool], classes: int, seed: int
) -> None:
    groups = np.arange(len(right)) % classes
    for interval in (
        bootstrap(np.array(right), seed=seed),
        bootstrap(np.array(right), groups, seed=seed),
    ):
        assert 0.0 <= interval.low <= interval.high <= 1.0
    assert bootstrap(np.array(right)).value == pytest.approx(np.mean(right))


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(DataError, match="not one example"):
        bootstrap(np.array([]))
    with pytest.raises(DataError, match="1 of 2 values are not finite"):
        bootstrap(np.array([0.5, np.nan]))


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    generator = np.random.default_rng(0)
    first = (generator.random(1000) < 0.5).astype(float)
    second = first.copy()
    second[:30] = 0.0  # the second model loses a few that the first had
    difference = paired_difference(first, second)
    assert difference.value == pytest.approx(first[:30].sum() / 1000)
    assert difference.low > 0  # although the two models' own intervals overlap widely
    assert bootstrap(first).low < bootstrap(second).high
    with pytest.raises(DataError, match="same examples"):
        paired_difference(first, second[:-1])
