"""Roles, and the kept share over tasks."""

from __future__ import annotations

import numpy as np
import pytest

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.report.before_after.comparison import compare_models
from corda_vlm.report.before_after.options import Roles
from tests.report.before_after.invented import interval, measure, model, right, told

BEFORE = model(
    "before", measure("sums", right(0.1)), measure("old", right(0.8)), measure("older", right(0.5))
)
AFTER = model(
    "after", measure("sums", right(0.7)), measure("old", right(0.6)), measure("older", right(0.5))
)


def test_the_kept_share_is_the_mean_over_what_is_no_gain():
    (one,) = compare_models(BEFORE, [AFTER], Roles(gain=["sums"]))
    assert [(of.task, of.role) for of in one.changes] == [
        ("sums", "gain"), ("old", "retention"), ("older", "retention")
    ]  # fmt: skip
    assert isinstance(one.kept, Interval)
    assert interval(one.kept).value == pytest.approx((0.75 + 1.0) / 2)
    assert interval(one.kept).low < interval(one.kept).value < interval(one.kept).high


def test_the_interval_of_the_mean_is_narrower_than_those_of_its_tasks():
    """Ten tasks of equal luck, each drawn for itself."""
    generator = np.random.default_rng(0)
    before, after = [], []
    for name in "abcdefghij":
        known = generator.random(200) < 0.7
        before.append(measure(name, known))
        after.append(measure(name, known & (generator.random(200) < 0.9)))
    (one,) = compare_models(model("before", *before), [model("after", *after)], Roles())
    widths = [interval(of.kept).high - interval(of.kept).low for of in one.changes]
    assert interval(one.kept).high - interval(one.kept).low == pytest.approx(
        np.mean(widths) / np.sqrt(10), rel=0.2
    )


def test_one_task_without_an_interval_leaves_the_mean_without_one():
    before, after = (
        model("b", measure("old", right(0.5)), told("x", 0.5)),
        model("a", measure("old", right(0.5)), told("x", 0.4)),
    )
    (one,) = compare_models(before, [after], Roles())
    assert one.kept == pytest.approx(0.9)


def test_retention_names_what_is_looked_at():
    (one,) = compare_models(BEFORE, [AFTER], Roles(gain=["sums"], retention=["older"]))
    assert [of.task for of in one.changes] == ["sums", "older"]


def test_patterns_name_many():
    (one,) = compare_models(BEFORE, [AFTER], Roles(gain=["old*"]))
    assert [of.task for of in one.gained] == ["old", "older"]


def test_roles_of_the_results_count_where_none_are_given():
    before = model(
        "b", measure("sums", right(0.1), role="gain"), measure("dev", right(0.1), role="selection")
    )
    (one,) = compare_models(before, [before], Roles())
    assert [(of.task, of.role) for of in one.changes] == [("sums", "gain")]


def test_roles_of_the_results_count_for_what_gain_does_not_name():
    before = model(
        "b", measure("sums", right(0.1), role="gain"), measure("new", right(0.1)), measure("old", right(0.8))
    )  # fmt: skip
    (one,) = compare_models(before, [before], Roles(gain=["new"]))
    assert [of.task for of in one.gained] == ["sums", "new"]
    (one,) = compare_models(before, [before], Roles(gain=["new"], retention=["sums", "old"]))
    assert [of.task for of in one.gained] == ["new"], "what the user calls retention is that"


def test_chance_is_the_zero_of_what_is_known_and_may_be_given():
    (one,) = compare_models(BEFORE, [AFTER], Roles(retention=["old"], chance={"old": 0.4}))
    assert interval(one.kept).value == pytest.approx(0.5)


def test_the_metric_is_the_first_that_both_have_or_the_one_that_is_named():
    def of(acc: float, norm: float, name: str):
        return model(name, told("t", acc, metric="acc"), told("t", norm, metric="acc_norm"))

    (first,) = compare_models(of(0.5, 0.8, "b"), [of(0.5, 0.4, "a")], Roles())
    (named,) = compare_models(
        of(0.5, 0.8, "b"), [of(0.5, 0.4, "a")], Roles(metrics={"t": "acc_norm"})
    )
    assert (first.kept, named.kept) == (1.0, 0.5)
    with pytest.raises(
        UnknownNameError, match="unknown metric of t 'f1'; choose one of: acc, acc_norm"
    ):
        compare_models(of(0.5, 0.8, "b"), [of(0.5, 0.4, "a")], Roles(metrics={"t": "f1"}))


def test_a_task_in_one_and_not_in_the_other():
    less = model("after", measure("sums", right(0.7)), measure("old", right(0.6)))
    with pytest.raises(
        CordaError, match=r"'after' has no results for 'older'.*sums\.json.*--retention"
    ):
        compare_models(BEFORE, [less], Roles(gain=["sums"]))
    with pytest.raises(CordaError, match="'before' has no results for 'older'"):
        compare_models(less.__class__("before", less.tools, less.measures), [AFTER], Roles())
    (one,) = compare_models(BEFORE, [less], Roles(gain=["sums"], retention=["old"]))
    assert interval(one.kept).value == pytest.approx(0.75)


@pytest.mark.parametrize(
    "roles", [Roles(gain=["sum"]), Roles(retention=["sum"]), Roles(chance={"sum": 0.1})]
)
def test_a_name_that_no_results_have(roles):
    with pytest.raises(UnknownNameError, match="Did you mean 'sums'"):
        compare_models(BEFORE, [AFTER], roles)


def test_chance_is_a_share():
    with pytest.raises(CordaError, match="chance of 'old' is 25; it is a share"):
        Roles(chance={"old": 25.0})


def test_no_metric_in_common():
    with pytest.raises(CordaError, match="'t' was measured by 'f1' before and by 'acc' after"):
        compare_models(
            model("b", told("t", 0.5, metric="f1")), [model("a", told("t", 0.5))], Roles()
        )
