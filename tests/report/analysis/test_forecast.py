"""The forecast of forgetting against what was forgotten. All numbers are invented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from corda_vlm.report import Results
from corda_vlm.report.analysis.forecast import forecasts_of, kendall, rankings, spearman
from corda_vlm.report.plots.forecast import forecast_picture
from corda_vlm.report.tables import rankings_table


def test_rank_correlation_by_hand() -> None:
    assert spearman(np.array([1.0, 2.0, 30.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1.0)
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: 4.5 / sqrt(4.5 · 5)
    ties = spearman(np.array([1.0, 2.0, 2.0, 5.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert ties == pytest.approx(4.5 / np.sqrt(4.5 * 5.0))
    assert np.isnan(spearman(np.array([1.0]), np.array([1.0])))
    assert np.isnan(spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])))


# Whole numbers: two floats that differ by the last bit may have the same logarithm.
@given(st.lists(st.integers(1, 1000), min_size=3, max_size=12, unique=True))
@settings(max_examples=50, deadline=None)
def test_only_the_order_counts(values: list[int]) -> None:
    first = np.array(values, dtype=float)
    second = np.arange(len(values), dtype=float)
    assert spearman(np.log(first), second) == pytest.approx(spearman(first, second))
    assert spearman(first, -second) == pytest.approx(-spearman(first, second))


def test_the_picture_is_drawn_only_with_forecasts(invented: Any, tmp_path: Path) -> None:
    path = tmp_path / "forecast.png"
    assert forecast_picture(Results.of(invented.study(invented.DEMO)), path) == []
    assert not path.exists()
    results = Results.of(invented.large_study(("lora", "corda-kpm", "lora-anchor")))
    (found,) = forecast_picture(results, path)
    assert len(found.kept) == 3 * 4 * 3, "scaled models are left out"
    assert found.correlation < -0.95
    with Image.open(path) as picture:
        assert min(picture.size) > 400


def test_a_forecast_of_zero_has_no_place_on_the_axis(invented: Any, tmp_path: Path) -> None:
    rows = [{**row, "forecast": 0.0} for row in invented.study(invented.DEMO)]
    assert forecast_picture(Results.of(rows), tmp_path / "forecast.png") == []
    assert len(forecasts_of(Results.of(rows)).kept) == 18


def test_kendall_by_hand() -> None:
    assert kendall(np.array([1.0, 2.0, 30.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1.0)
    # of 6 pairs 5 are in one order and one is tied on the left: 5 / sqrt(5 · 6)
    ties = kendall(np.array([1.0, 2.0, 2.0, 5.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert ties == pytest.approx(5 / np.sqrt(30))
    assert np.isnan(kendall(np.array([1.0]), np.array([1.0])))


def noted(invented: Any) -> list[dict[str, Any]]:
    """A study whose size of the update orders all models rightly, and whose KL only those of one method."""
    rows = invented.large_study(("lora", "corda-kpm", "lora-anchor"), scales=())
    factor = {"lora": 1.0, "corda-kpm": 30.0, "lora-anchor": 900.0}
    for row in rows[len(invented.BASE) :]:
        if (of := factor.get(row["method"])) is not None:
            row |= {"kl_new": row["forecast"] * of, "update_size": row["forecast"] ** 0.5}
    return rows


def test_the_predictors_of_forgetting_are_ranked(invented: Any) -> None:
    every, *within = rankings(Results.of(noted(invented)))
    assert every.of is None
    assert every.count == sum(ranking.count for ranking in within) == 36
    assert [ranking.of for ranking in within] == ["lora", "corda-kpm", "lora-anchor"]
    assert every.spearman["update_size"] == pytest.approx(every.spearman["forecast"])
    assert every.spearman["update_size"] < -0.95 < every.spearman["kl_new"]
    assert every.kendall["update_size"] < every.kendall["kl_new"]
    assert all(r.spearman["kl_new"] == pytest.approx(r.spearman["forecast"]) for r in within)
    (tie,) = (every.behind[n] for n in ("forecast", "update_size") if n in every.behind)
    assert (tie.value, tie.low, tie.high) == pytest.approx((0, 0, 0)), (
        "the same order in every resample"
    )
    worse = every.behind["kl_new"]
    assert 0 < worse.low < worse.value < worse.high
    assert all(not ranking.behind for ranking in within)
    cell = rankings_table([every]).rows[0][3]
    assert f"(+{worse.value:.2f}, {worse.low:.2f} to {worse.high:.2f})" in cell


def test_rows_without_the_other_predictors_count_for_the_forecast_alone(invented: Any) -> None:
    rows = noted(invented)
    for row in rows:
        if row["method"] == "lora":
            row.pop("kl_new")
    results = Results.of(rows)
    assert len(forecasts_of(results).kept) == 36
    every, *within = rankings(results)
    assert (every.count, len(within)) == (24, 2)
    assert rankings(Results.of(invented.large_study(("lora",)))) == [], "nothing to compare"
    for row in rows:
        for name in ("kl_new", "update_size", "forecast"):
            if (row["method"] == "lora") != (name == "forecast"):
                row.pop(name, None)
    assert rankings(Results.of(rows)) == [], "no model carries all"


def test_each_predictor_has_a_panel(invented: Any, tmp_path: Path) -> None:
    drawn = forecast_picture(Results.of(noted(invented)), tmp_path / "forecast.png")
    assert [one.predictor for one in drawn] == ["forecast", "kl_new", "update_size"]
    table = rankings_table(rankings(Results.of(noted(invented))))
    assert [row[0] for row in table.rows][:3] == ["all", "within a method, mean", "within lora"]
    assert table.headings[3] == "KL to the base on the new task"
