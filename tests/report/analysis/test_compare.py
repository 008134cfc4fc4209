"""Curves against each other, and single models chosen without the test. All numbers are invented."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.report import Results, choose, dominates
from corda_vlm.report.analysis.choose import Choice
from corda_vlm.report.analysis.compare import against, compare
from corda_vlm.report.analysis.curve import Curve, Point, Setting
from corda_vlm.report.analysis.seeds import SeedBootstrap
from corda_vlm.report.tables import chosen_table, dominance_table, equal_table


def two_lines(invented: Any, offsets: list[float], seeds_differ: float = 0.0) -> Results:
    """lora on a straight line from (0.2, 0.8) to (0.8, 0.2); kpm above it by an offset a seed."""
    rows = invented.rows_of("base", invented.BASE)
    for seed, offset in enumerate(offsets):
        for rate, task in ((1.0, 0.2), (2.0, 0.8)):
            kept = 1.0 - task + seeds_differ * seed
            rows += invented.rows_of("lora", invented.at(task, kept), rate=rate, seed=seed)
            rows += invented.rows_of("kpm", invented.at(task, kept + offset), rate=rate, seed=seed)
    return Results.of(rows)


class TestDominates:
    def test_by_hand(self, invented: Any) -> None:
        found = dominates(two_lines(invented, [0.1, 0.2, 0.3]), "kpm", "lora")
        assert (found.start, found.stop) == (pytest.approx(0.15), pytest.approx(0.8))
        assert found.mean.value == pytest.approx(0.2)
        assert found.minimum.value == pytest.approx(0.2)
        # with three seeds the extremes are all three draws of one seed, 1 in 27 each
        assert (found.mean.low, found.mean.high) == (pytest.approx(0.1), pytest.approx(0.3))
        assert found.above == 1.0
        assert found.everywhere

    def test_paired(self, invented: Any) -> None:
        """Seeds that move both curves alike leave no doubt about their difference."""
        found = dominates(two_lines(invented, [0.1] * 4, seeds_differ=0.05), "kpm", "lora")
        assert found.mean.low == pytest.approx(found.mean.high)

    def test_crossing_curves(self, invented: Any) -> None:
        rows = invented.rows_of("base", invented.BASE)
        for method, ends in (("lora", (0.7, 0.3)), ("kpm", (0.9, 0.1))):
            for rate, task, kept in zip((1.0, 2.0), (0.2, 0.8), ends, strict=True):
                rows += invented.rows_of(method, invented.at(task, kept), rate=rate, seed=0)
        found = dominates(Results.of(rows), "kpm", "lora", start=0.2, stop=0.8)
        assert found.mean.value == pytest.approx(0.0, abs=1e-9)
        assert found.minimum.value == pytest.approx(-0.2)
        assert found.where == pytest.approx(0.8)
        assert found.above == pytest.approx(0.5, abs=0.01)
        assert not found.everywhere

    def test_what_is_not_reached_is_not_kept(self, invented: Any) -> None:
        rows = invented.rows_of("base", invented.BASE)
        for method, tasks in (("lora", (0.2, 0.8)), ("kpm", (0.2, 0.5))):
            for rate, task in zip((1.0, 2.0), tasks, strict=True):
                rows += invented.rows_of(method, invented.at(task, 0.6), rate=rate, seed=0)
        found = dominates(Results.of(rows), "kpm", "lora", start=0.2)
        assert found.minimum.value == pytest.approx(-0.6)
        assert found.mean.value == pytest.approx(-0.3, abs=0.01)

    def test_scaled_curves_begin_at_the_base_model(self, invented: Any) -> None:
        rows = invented.rows_of("base", invented.BASE)
        for scale, task, kept in ((1.0, 0.8, 0.4), (0.5, 0.6, 0.8)):
            rows += invented.rows_of("lora", invented.at(task, kept), rate=1.0, seed=0, scale=scale)
        found = dominates(Results.of(rows), "lora, scaled", "lora")
        # lora alone keeps 0.4 everywhere; scaled: 1 at 0.1, 0.8 at 0.6, 0.4 at 0.8, the range from 0.15
        expected = ((0.98 + 0.8) / 2 * 0.45 + (0.8 + 0.4) / 2 * 0.2) / 0.65 - 0.4
        assert found.mean.value == pytest.approx(expected, abs=1e-3)

    def test_all_others(self, invented: Any) -> None:
        results = Results.of(invented.study(invented.DEMO))
        assert [d.curve for d in against(results, "lora")] == ["corda-kpm", "full"]

    def test_refused(self, invented: Any) -> None:
        results = two_lines(invented, [0.1])
        with pytest.raises(UnknownNameError, match="unknown curve 'kmp'"):
            dominates(results, "kmp", "lora")
        with pytest.raises(CordaError, match="no range of task accuracies"):
            dominates(results, "kpm", "lora", start=0.9)
        alone = Results.of(invented.study({"full": invented.DEMO["full"]}))
        with pytest.raises(CordaError, match="train it, or give start and stop"):
            dominates(alone, "full", "full")


def test_three_seeds_have_ten_resamples(invented: Any) -> None:
    seeds = SeedBootstrap(two_lines(invented, [0.1, 0.2, 0.3]))
    assert len(seeds.over(lambda _: 0.0)) == 1 + 10


def test_what_is_not_certain_is_told(invented):
    """A curve that some resamples do not reach says so, and one seed makes nothing certain."""
    rows = invented.rows_of("base", {"new": 0.1, "old": 0.8})
    for seed, (task, kept) in enumerate(((0.86, 0.7), (0.85, 0.7), (0.72, 0.1))):
        rows += invented.rows_of("lora", {"new": 0.8, "old": 0.4}, rate=1.0, seed=seed)
        rows += invented.rows_of("kpm", {"new": task, "old": kept}, rate=1.0, seed=seed)
    results = Results.of(rows)
    table = equal_table(compare(results, shares=(1.0,)))
    assert "of resamples" in table.rows[0][1]
    assert "not reached" not in table.rows[0][1]
    assert "of the seeds only" in table.caption
    above = against(results, "lora", start=0.2, stop=0.7)
    assert "with 95% confidence: none" in dominance_table(above, 3).caption
    one = [row for row in rows if row["seed"] in (None, 0)]
    above = against(Results.of(one), "lora", start=0.2, stop=0.7)
    assert "by this one seed: kpm" in dominance_table(above, 1).caption


class TestCurve:
    def test_a_grid_of_rates_and_scales_is_its_upper_hull(self) -> None:
        """Two learning rates, each scaled: at every accuracy the better line counts."""
        base = Point(0.1, 1.0)
        grid = {
            Setting(1.0, 1.0): Point(0.5, 0.7), Setting(1.0, 0.5): Point(0.3, 0.95),
            Setting(2.0, 1.0): Point(0.9, 0.1), Setting(2.0, 0.5): Point(0.6, 0.8),
        }  # fmt: skip
        curve = Curve(grid, base)
        assert curve.at(np.array([0.1, 0.3, 0.6, 0.9])) == pytest.approx([1.0, 0.95, 0.8, 0.1])
        # at 0.5 the strong rate at half its strength keeps 0.84 on its way to the base, or 0.85 on the way to the
        # other rate's half; the weak rate as trained only 0.7
        assert curve.at(np.array([0.5]))[0] == pytest.approx(0.85)
        assert np.isnan(curve.at(np.array([0.91]))[0])

    def test_a_rate_that_was_not_scaled_yet_does_not_join_the_base(self) -> None:
        grid = {Setting(1.0, 1.0): Point(0.9, 0.1)}
        curve = Curve(grid, Point(0.1, 1.0))
        assert curve.at(np.array([0.5])) == pytest.approx(0.1)
        grid[Setting(1.0, 0.5)] = Point(0.5, 0.5)
        curve = Curve(grid, Point(0.1, 1.0))
        assert curve.at(np.array([0.3])) == pytest.approx(0.75)

    def test_scale_0_may_be_measured_and_scales_beyond_1_too(self) -> None:
        grid = {Setting(1.0, s): Point(0.1 + 0.4 * s, 1 - 0.4 * s) for s in (0.0, 1.0, 1.5)}
        curve = Curve(grid, Point(0.1, 1.0))
        assert curve.at(np.array([0.3, 0.6])) == pytest.approx([0.8, 0.5])


class TestChoose:
    @staticmethod
    def rows(invented: Any, forecasts: bool) -> list[dict[str, Any]]:
        """On validation lora's best has 0.8, so 0.76 is enough: for kpm rates 2 and 3, and rate 3 scaled."""
        rows = invented.rows_of("base", {**invented.BASE, "new-val": 0.1})
        models = [
            ("lora", 1.0, 1.0, 0.80, 0.80, 0.2, 0.4), ("kpm", 1.0, 1.0, 0.70, 0.79, 0.9, 0.1),
            ("kpm", 2.0, 1.0, 0.77, 0.70, 0.6, 0.3), ("kpm", 3.0, 1.0, 0.90, 0.85, 0.1, 0.5),
            ("kpm", 3.0, 0.5, 0.78, 0.74, 0.7, 0.5),
        ]  # fmt: skip
        for method, rate, scale, val, task, kept, forecast in models:
            values = {**invented.at(task, kept), "new-val": val}
            found = invented.rows_of(method, values, rate=rate, seed=0, scale=scale)
            rows += [{**row, "forecast": forecast} for row in found] if forecasts else found
        return rows

    def test_the_one_that_just_learns_enough_on_validation(self, invented: Any) -> None:
        results = Results.of(self.rows(invented, forecasts=False))
        found = {c.curve: c for c in choose(results)}
        # rate 1 would be best on the test, and is not looked at; rate 2 learns enough on validation, if not on the test
        assert found["kpm"].setting == found["kpm, scaled"].setting == Setting(2.0)
        assert found["kpm"].task.value == pytest.approx(0.70)
        assert found["kpm"].share.value == pytest.approx(0.70 / 0.80)
        assert found["kpm"].kept.value == pytest.approx(0.6)
        # accuracy, chance not subtracted: (0.04 + 0.6 · 0.40) / 0.44
        assert found["kpm"].raw["old"].value == pytest.approx(0.28 / 0.44)
        assert found["kpm"].raw["older"].value == pytest.approx(0.6)

    def test_or_the_one_of_which_least_forgetting_is_foretold(self, invented: Any) -> None:
        results = Results.of(self.rows(invented, forecasts=True))
        # scaling by 0.5 quarters the forecast of 0.5
        assert results.forecast("kpm", Setting(3.0, 0.5)) == pytest.approx(0.125)
        found = {c.curve: c for c in choose(results)}
        assert found["kpm, scaled"].setting == Setting(3.0, 0.5)
        assert found["kpm, scaled"].forecast
        assert found["kpm"].setting == Setting(2.0)

    def test_none_learns_enough(self, invented: Any) -> None:
        rows = [row for row in self.rows(invented, forecasts=False) if row["learning_rate"] != 3.0]
        rows = [{**r, "value": 0.5} if r["method"] == "kpm" and r["task"] == "new-val" else r for r in rows]  # fmt: skip
        found = {c.curve: c for c in choose(Results.of(rows))}
        assert found["kpm"].setting is None
        assert found["kpm"].raw is None

    def test_without_the_reference(self, invented: Any) -> None:
        assert choose(Results.of(invented.study({"full": invented.DEMO["full"]}))) == []


def test_a_base_barely_above_chance_has_nothing_to_keep(invented: Any) -> None:
    """Its interval reaches down to chance, so a division by what is above it would blow luck up."""
    rows = invented.study(invented.DEMO)
    barely = [
        {**row, "value": 0.05, "low": 0.03, "high": 0.07} if (row["method"], row["task"]) == ("base", "old") else row
        for row in rows
    ]  # fmt: skip
    assert Results.of(rows).known == ("old", "older")
    assert Results.of(barely).known == ("older",)
    without = [{k: v for k, v in row.items() if k != "low"} for row in barely]
    assert Results.of(without).known == ("old", "older"), "no interval, so the value decides"


def test_how_models_were_chosen_is_told(invented: Any) -> None:
    results = two_lines(invented, [0.1])
    caption = {
        forecasts: chosen_table(
            results, [Choice(str(i), Setting(1.0), forecast=f) for i, f in enumerate(forecasts)]
        ).caption
        for forecasts in ((True, True), (True, False), (False, False))
    }
    assert "smallest forecast of forgetting; then" in caption[True, True]
    assert "(of methods without forecasts the one that just learns enough)" in caption[True, False]
    assert "the one that just learns enough; then" in caption[False, False]
