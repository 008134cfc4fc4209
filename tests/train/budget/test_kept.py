"""The share that is kept, its interval, and how many records it takes to tell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corda_vlm.errors import CordaError
from corda_vlm.train.budget.kept import (
    MARGIN,
    check_probe,
    half_width,
    kept_of,
    records_needed,
    share_kept,
    widest,
)

shares = st.floats(0.05, 1.0)


def drawn(count: int, known: float, keep: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong before and after: of those right before, a share `keep` still is; none is learned."""
    numbers = np.random.RandomState(seed)
    before = (numbers.rand(count) < known).astype(float)
    return before * (numbers.rand(count) < keep), before


def test_what_is_kept_is_a_share_above_chance() -> None:
    before, now = np.array([1.0, 1.0, 1.0, 0.0]), np.array([1.0, 1.0, 0.0, 0.0])
    assert kept_of(now, before, 0.25).share == pytest.approx((0.5 - 0.25) / (0.75 - 0.25))
    same = kept_of(before, before, 0.25)
    assert (same.share, same.low, same.high, same.records) == (1.0, 1.0, 1.0, 4)


def test_a_part_in_which_little_was_right_is_measured_by_what_the_whole_knows() -> None:
    nothing, half = np.zeros(4), np.array([1.0, 0.0, 0.0, 0.0])
    assert share_kept(nothing, nothing, 0.5) == 1.0
    # before, this part is at chance, and a part below it would turn the sign
    assert share_kept(nothing, half, 0.5) == pytest.approx(0.5)
    assert share_kept(half, nothing, 0.5) == pytest.approx(1.5)


def test_half_of_what_may_be_forgotten_is_to_be_told() -> None:
    assert widest(0.9) == pytest.approx(0.05 + MARGIN)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        now, before = drawn(300, 0.8, 0.9, seed)
        kept = kept_of(now, before, 0.0)
        held += kept.low <= 0.9 <= kept.high
    assert 0.9 <= held / 200 <= 0.99


@given(shares, st.floats(0.02, 1.0))
def test_so_many_records_as_are_needed_are_enough_and_fewer_are_not(known, keep) -> None:
    count = records_needed(known, keep)
    assert half_width(known, keep, count) <= widest(keep) * (1 + 1e-9)
    if count > 1:
        assert half_width(known, keep, count - 1) > widest(keep)


def test_half_widths_are_those_that_intervals_have() -> None:
    widths = []
    for seed in range(50):
        now, before = drawn(400, 0.8, 0.9, seed)
        kept = kept_of(now, before, 0.0)
        widths.append((kept.high - kept.low) / 2)
    # it reckons with gains that make up for some of the losses, and there are none here
    assert np.mean(widths) < half_width(0.8, 0.9, 400) < 2 * np.mean(widths)


def test_a_probe_too_small_says_how_many_it_takes() -> None:
    before = np.ones(40)
    needed = records_needed(0.99, 0.95)
    with pytest.raises(CordaError, match=rf"40 records are too few .* It takes {needed} records"):
        check_probe(before, 0.01, 0.95, "top1", "photos")
    check_probe(np.ones(needed), 0.01, 0.95, "top1", "photos")
    with pytest.raises(CordaError, match="photos: 0 records are too few"):
        check_probe(np.empty(0), 0.01, 0.95, "top1", "photos")
    assert half_width(1.0, 0.95, 0) == np.inf


def test_a_model_that_guesses_has_nothing_to_keep() -> None:
    before = (np.arange(300) % 10 == 0).astype(float)
    with pytest.raises(CordaError, match="knows nothing there that could be kept"):
        check_probe(before, 0.1, 0.95, "top1", "photos")
    with pytest.raises(CordaError, match="knows nothing"):
        check_probe(np.zeros(300), 0.0, 0.95, "answers", "questions")
