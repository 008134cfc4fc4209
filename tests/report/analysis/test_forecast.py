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
from corda_vlm.report.analysis.forecast import forecasts_of, spearman
from corda_vlm.report.plots.forecast import forecast_picture


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
    assert forecast_picture(Results.of(invented.study(invented.DEMO)), path) is None
    assert not path.exists()
    results = Results.of(invented.large_study(("lora", "corda-kpm", "lora-anchor")))
    found = forecast_picture(results, path)
    assert found is not None
    assert len(found.kept) == 3 * 4 * 3, "scaled models are left out"
    assert found.correlation < -0.95
    with Image.open(path) as picture:
        assert min(picture.size) > 400


def test_a_forecast_of_zero_has_no_place_on_the_axis(invented: Any, tmp_path: Path) -> None:
    rows = [{**row, "forecast": 0.0} for row in invented.study(invented.DEMO)]
    assert forecast_picture(Results.of(rows), tmp_path / "forecast.png") is None
    assert len(forecasts_of(Results.of(rows)).kept) == 18
