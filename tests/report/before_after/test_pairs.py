"""What lies between two measures of one task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corda_vlm.errors import CordaError, DataError
from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.report.before_after.comparison import number
from corda_vlm.report.before_after.pairs import NONE, OWN, PAIRED, UNPAIRED, change
from corda_vlm.report.formats.base import Samples, samples_of
from tests.report.before_after.invented import interval, measure, right, told


@settings(max_examples=25, deadline=None)
@given(
    before=st.lists(st.booleans(), min_size=5, max_size=40),
    after=st.lists(st.booleans(), min_size=40, max_size=40),
    chance=st.sampled_from([0.0, 0.25]),
)
def test_the_kept_share_is_the_definition_and_lies_in_its_interval(before, after, chance):
    after = after[: len(before)]
    one = change(measure("t", before), measure("t", after), "retention", chance, resamples=200)
    known, new = np.mean(before), np.mean(after)
    assert isinstance(one.gain, Interval)
    assert interval(one.gain).value == pytest.approx(new - known)
    assert (
        interval(one.gain).low
        <= interval(one.gain).value + 1e-12
        <= interval(one.gain).high + 2e-12
    )
    if one.kept is not None:
        assert number(one.kept) == pytest.approx((new - chance) / (known - chance))
    else:
        assert one.unknown


def test_a_model_that_did_not_change_keeps_everything_without_doubt():
    one = change(measure("t", right(0.6)), measure("t", right(0.6)), "retention", 0.25)
    assert (one.how, one.gain) == (PAIRED, Interval(0.0, 0.0, 0.0))
    assert one.kept == Interval(1.0, 1.0, 1.0)


def test_pairing_tells_more_than_two_intervals_do():
    before = replace(measure("t", right(0.6)), low=0.53, high=0.67)
    after = replace(measure("t", right(0.55)), low=0.48, high=0.62)
    paired = change(before, after, "retention", 0.0)
    unpaired = change(before, replace(after, samples=None), "retention", 0.0)
    assert (paired.how, unpaired.how) == (PAIRED, UNPAIRED)
    assert interval(paired.gain).high - interval(paired.gain).low < 0.6 * (
        interval(unpaired.gain).high - interval(unpaired.gain).low
    )
    assert interval(unpaired.gain).low < -0.05 < interval(unpaired.gain).high


def test_samples_pair_by_their_ids_whatever_their_order():
    before = measure("t", [1, 0, 1, 1, 0, 1])
    turned = {str(place): score for place, score in reversed(list(enumerate([1, 0, 1, 1, 0, 1])))}
    after = replace(before, samples=samples_of({k: float(v) for k, v in turned.items()}, "acc"))
    assert change(before, after, "retention", 0.0).gain == Interval(0.0, 0.0, 0.0)


def test_a_gain_that_the_run_told_is_taken_where_it_fits():
    after = told("t", 0.55, gain=Interval(-0.05, -0.07, -0.03))
    one = change(told("t", 0.6), after, "retention", 0.1)
    assert one.how == OWN
    assert interval(one.kept).value == pytest.approx(0.9)
    assert interval(one.kept).low == pytest.approx(1 - 0.07 / 0.5, abs=0.002)
    other = change(told("t", 0.7), after, "retention", 0.1)  # of another model before
    assert other.how == NONE


def test_without_samples_and_errors_there_is_no_interval():
    one = change(told("t", 0.6), told("t", 0.5), "retention", 0.0)
    assert (one.how, one.kept) == (NONE, pytest.approx(0.5 / 0.6))


def test_where_nothing_was_known_nothing_is_kept():
    hair = measure("t", [float(place % 4 == 0) for place in range(104)] + [1.0])  # 0.257 of 0.25
    one = change(hair, measure("t", right(0.5, 105)), "retention", 0.25)
    assert (one.kept, one.unknown) == (None, True)


def test_less_is_better_has_no_kept_share():
    one = change(told("t", 20.0, rises=False), told("t", 30.0, rises=False), "retention", 0.0)
    assert (one.kept, one.unknown, one.gain) == (None, False, 10.0)


def test_classes_and_logarithms_are_averaged_as_the_score_is():
    scores = np.log([0.5, 0.25, 0.125, 0.5])
    before = measure("t", scores)
    assert before.samples is not None
    outcome = replace(before.samples.outcome, exp=True)
    before = replace(
        before, value=float(np.exp(scores.mean())), samples=Samples(before.samples.ids, outcome)
    )
    one = change(before, before, "retention", 0.0)
    assert one.kept == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (measure("t", right(0.5, 150)), "200 before and 150 after, 150 of them the same"),
        (
            replace(
                measure("t", right(0.5)),
                samples=samples_of({f"x{n}": 1.0 for n in range(200)}, "acc"),
            ),
            "0 of them the same",
        ),
    ],
)
def test_samples_that_do_not_pair(after, expected):
    with pytest.raises(DataError, match=expected) as error:
        change(measure("t", right(0.5)), after, "retention", 0.0)
    assert "evaluate both on the same data with the same limit" in str(error.value)


def test_equal_ids_of_other_data():
    def of(digest: str):
        samples = samples_of({"7": 1.0, "8": 0.0}, "acc", {"7": "same", "8": digest})
        return replace(measure("t", [1, 0]), samples=samples)

    with pytest.raises(DataError, match="'8' is of other data after than before"):
        change(of("one"), of("other"), "retention", 0.0)


def test_what_was_not_measured_alike():
    before = told("t", 0.5, conditions={"number of shots": "0"}, file=Path("a.json"))
    after = told("t", 0.5, conditions={"number of shots": "5"}, file=Path("b.json"))
    with pytest.raises(
        CordaError, match=r"number of shots is 0 before and 5 after.*a\.json and b\.json"
    ):
        change(before, after, "retention", 0.0)
