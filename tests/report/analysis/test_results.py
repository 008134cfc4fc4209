"""Frontiers: what is kept at equal task accuracy, by hand, and intervals over seeds. All numbers are invented."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corda_vlm.errors import DataError
from corda_vlm.report import write_report
from corda_vlm.report.analysis.compare import compare
from corda_vlm.report.analysis.curve import Curve, Point, Setting, heights, mean_height
from corda_vlm.report.analysis.results import Results


def kept_at(
    points: Mapping[Setting, Point], task: float, base: Point | None = None
) -> float | None:
    found = float(Curve(points, base).at(np.array([task]))[0])
    return None if np.isnan(found) else found


def area(points: Mapping[Setting, Point], start: float, stop: float) -> float:
    return mean_height(heights(Curve(points), start, stop))


def test_rows_are_arranged(invented: Any) -> None:
    results = Results.of(invented.study(invented.DEMO))
    assert results.gain == ("new",)
    assert results.retention == ("old", "older")
    assert results.seeds == [0, 1]
    assert results.base_point == Point(0.1, 1.0)
    assert list(results.trained) == ["corda-kpm", "lora", "full"]
    points = results.points("lora")
    assert [setting.learning_rate for setting in points] == [1e-3, 2e-3, 4e-3]
    assert points[Setting(1e-3)][0].task == pytest.approx(0.515)
    assert points[Setting(1e-3)][0].kept == pytest.approx(0.555)


def test_kept_share_subtracts_chance(invented: Any) -> None:
    results = Results.of(invented.rows_of("base", invented.BASE))
    assert results.kept_share("old", 0.44) == 1.0
    assert results.kept_share("old", 0.04) == 0.0
    assert results.kept_share("old", 0.24) == pytest.approx(0.5)
    assert np.isnan(results.kept_share("new", 0.9)), "the base model was at chance on it"


def test_what_the_base_model_never_knew_does_not_count(invented: Any, tmp_path: Any) -> None:
    rows = invented.study({"lora": invented.DEMO["lora"], "corda-kpm": invented.DEMO["corda-kpm"]})
    plain = Results.of(rows)
    rows = [{**row, "value": 0.04} if row["task"] == "old" else row for row in rows]
    results = Results.of(rows)
    assert (plain.known, results.known) == (("old", "older"), ("older",))
    kept = results.points("lora")[Setting(1e-3)][0].kept
    assert kept == pytest.approx(plain.points("lora")[Setting(1e-3)][0].kept)
    write_report(invented.write_run(tmp_path / "one", rows))
    told = (tmp_path / "one" / "report.md").read_text()
    assert "no better than chance on old, so it does not count" in told

    rows = [{**row, "value": 0.0} if row["task"] == "older" else row for row in rows]
    write_report(invented.write_run(tmp_path / "none", rows))
    assert "there is no knowledge to keep" in (tmp_path / "none" / "report.md").read_text()


def test_the_first_metric_of_a_task_is_the_one_compared_and_the_last_row_counts(
    invented: Any,
) -> None:
    rows = invented.rows_of("base", invented.BASE) + invented.rows_of(
        "lora", invented.at(0.5, 0.5), rate=1.0
    )
    rows.append({**rows[3], "metric": "top5", "value": 0.99})
    rows.append({**rows[3], "value": 0.75})
    assert Results.of(rows).points("lora")[Setting(1.0)][None].task == 0.75


def test_a_model_still_being_measured_has_no_place_yet(invented: Any) -> None:
    rows = invented.rows_of("base", invented.BASE) + invented.rows_of(
        "lora", {"new": 0.5}, rate=1.0, seed=0
    )
    results = Results.of(rows)
    assert results.points("lora") == {}
    assert compare(results) == []


def test_without_the_base_nothing_can_be_said(invented: Any) -> None:
    rows = invented.rows_of("base", {"new": 0.1}) + invented.rows_of("lora", invented.at(0.5, 0.5))
    with pytest.raises(DataError, match="no score for old, older"):
        Results.of(rows)


def curve(*points: tuple[float, float]) -> dict[Setting, Point]:
    return {Setting(float(rate)): Point(*point) for rate, point in enumerate(points, start=1)}


def test_interpolated_by_hand() -> None:
    points = curve((0.5, 0.8), (0.7, 0.4), (0.8, 0.1))
    assert kept_at(points, 0.6) == pytest.approx(0.6)  # half-way between the first two
    assert kept_at(points, 0.7) == pytest.approx(0.4)
    assert kept_at(points, 0.2) == pytest.approx(0.8)  # at least 0.2 is learnt by the first
    assert kept_at(points, 0.81) is None


def test_a_learning_rate_too_large_does_not_hide_a_better_one() -> None:
    # The third diverged: less learnt and all forgotten. At 0.65 the second one is what counts.
    points = curve((0.5, 0.8), (0.7, 0.4), (0.6, 0.0))
    assert kept_at(points, 0.65) == pytest.approx(0.5)


def test_scaling_goes_down_to_the_base_model() -> None:
    points = {Setting(1.0, 1.0): Point(0.9, 0.2), Setting(1.0, 0.5): Point(0.5, 0.7)}
    base = Point(0.1, 1.0)
    assert kept_at(points, 0.3, base) == pytest.approx(0.85)
    assert kept_at(points, 0.7, base) == pytest.approx(0.45)
    assert kept_at(points, 0.0, base) == 1.0
    # Two learning rates at one scale are neighbours too.
    points[Setting(2.0, 1.0)] = Point(1.0, 0.0)
    assert kept_at(points, 0.95, base) == pytest.approx(0.1)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-0.2, 1)), min_size=1, max_size=6),
    st.lists(st.floats(0, 1), min_size=2, max_size=5),
)
@example([(0.0, 0.0), (5e-324, 0.0)], [0.0, 1.0])
@settings(max_examples=80, deadline=None)
def test_a_frontier_never_rises(points: list[tuple[float, float]], tasks: list[float]) -> None:
    found = [kept_at(curve(*points), task) for task in sorted(tasks)]
    reached = [kept for kept in found if kept is not None]
    assert found[: len(reached)] == reached, "what is not reached comes last"
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(reached))


def test_area_by_hand() -> None:
    points = curve((0.2, 1.0), (0.6, 0.0))
    assert area(points, 0.2, 0.6) == pytest.approx(0.5)
    assert area(points, 0.2, 1.0) == pytest.approx(0.25, abs=0.01)  # 0 where it does not reach
    assert area(curve((0.9, 0.7)), 0.1, 0.8) == pytest.approx(0.7)


def test_compared_at_the_references_best(invented: Any) -> None:
    found = {(c.curve, c.share): c for c in compare(Results.of(invented.study(invented.DEMO)))}
    kpm = found[("corda-kpm", 1.0)]
    assert kpm.task == pytest.approx(0.80)
    assert kpm.kept is not None
    # Half-way from (0.76, 0.58) to (0.84, 0.28).
    assert kpm.kept.value == pytest.approx(0.43)
    assert kpm.kept.low <= kpm.kept.value <= kpm.kept.high
    assert kpm.ratio is not None
    assert kpm.ratio.value == pytest.approx(0.43 / 0.20)
    assert kpm.reached == 1.0
    lora = found[("lora", 1.0)]
    assert lora.ratio is not None
    assert (lora.ratio.low, lora.ratio.high) == (1.0, 1.0), (
        "paired: a method never differs from itself"
    )
    assert found[("lora", 0.95)].task == pytest.approx(0.76)
    assert found[("lora", 0.95)].kept.value == pytest.approx(0.20 + 0.17 * 4 / 9)  # type: ignore[union-attr]
    assert found[("corda-kpm", None)].kept.value > found[("lora", None)].kept.value  # type: ignore[union-attr]


def test_what_is_not_reached_is_said_so(invented: Any) -> None:
    weak = {"lora": [(1.0, 0.8, 0.2)], "corda-kpm": [(1.0, 0.5, 0.9)]}
    found = {(c.curve, c.share): c for c in compare(Results.of(invented.study(weak)))}
    assert found[("corda-kpm", 1.0)].kept is None
    assert found[("corda-kpm", 1.0)].ratio is None
    assert found[("corda-kpm", 1.0)].reached == 0.0
    assert compare(Results.of(invented.study({"full": invented.DEMO["full"]}))) == []


def test_seeds_of_one_run_are_compared_within_it(invented: Any) -> None:
    """Seeds that move all methods alike make wide intervals of each, and a narrow one of their ratio."""
    rows = invented.rows_of("base", invented.BASE)
    for seed, kept in enumerate((0.2, 0.3, 0.4, 0.5)):
        rows += invented.rows_of("lora", invented.at(0.8, kept), rate=1.0, seed=seed)
        rows += invented.rows_of("corda-kpm", invented.at(0.8, 2 * kept), rate=1.0, seed=seed)
    kpm = next(c for c in compare(Results.of(rows)) if c.curve == "corda-kpm")
    assert kpm.kept is not None
    assert kpm.ratio is not None
    assert kpm.kept.high - kpm.kept.low > 0.2
    assert kpm.ratio.low == pytest.approx(2.0)
    assert kpm.ratio.high == pytest.approx(2.0)


def test_the_best_learning_rate_is_chosen_on_the_selection_tasks(invented: Any) -> None:
    rows = invented.study({"lora": [(1.0, 0.7, 0.5), (2.0, 0.8, 0.3)]}, seeds=1)
    assert Results.of(rows).best_setting("lora") == Setting(2.0)
    for method, rate, value in (("base", None, 0.1), ("lora", 1.0, 0.75), ("lora", 2.0, 0.72)):
        seed = None if rate is None else 0
        rows.append({**rows[0], "method": method, "learning_rate": rate, "seed": seed, "task": "val",
                     "role": "selection", "value": value})  # fmt: skip
    results = Results.of(rows)
    assert results.best_setting("lora") == Setting(1.0)
    assert next(c for c in compare(results) if c.share == 1.0).task == pytest.approx(0.7)


def test_scaled_models_make_a_curve_of_their_own(invented: Any) -> None:
    rows = invented.study({"lora": [(1.0, 0.8, 0.2)]}, seeds=1)
    rows += invented.rows_of("lora", invented.at(0.7, 0.6), rate=1.0, seed=0, scale=0.5)
    results = Results.of(rows)
    assert results.curves() == {"lora": ("lora", False), "lora, scaled": ("lora", True)}
    found = {(c.curve, c.share): c for c in compare(results)}
    assert found[("lora", 0.95)].kept.value == pytest.approx(0.2)  # type: ignore[union-attr]
    # 0.76 lies 0.4 of the way from scale 1 (0.8, 0.2) to scale 0.5 (0.7, 0.6).
    assert found[("lora, scaled", 0.95)].kept.value == pytest.approx(0.36)  # type: ignore[union-attr]
