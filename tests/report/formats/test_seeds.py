"""Several seeds of one run are one model, with an interval over seeds and samples. All numbers are invented."""

from __future__ import annotations

import json

import numpy as np
import pytest

from corda_vlm.errors import CordaError
from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.evaluation.score_file import append_rows
from corda_vlm.report import BeforeAfterOptions, write_comparison
from corda_vlm.report.formats.registry import read_results
from corda_vlm.report.formats.seeds import mean_interval
from tests.report.invented import BASE, at, rows_of, study


def test_seeds_of_one_setting_are_one_model(tmp_path):
    rows = study({"kpm": [(1e-3, 0.8, 0.9), (2e-3, 0.9, 0.5)], "lora": [(1e-3, 0.8, 0.6)]}, seeds=3)
    append_rows(tmp_path / "scores.jsonl", rows)
    models = read_results(tmp_path)
    assert [model.name for model in models] == ["base", "kpm, 0.001", "kpm, 0.002", "lora"]
    new = models[1].of("new")
    assert new is not None
    assert (new.value, new.seeds) == (pytest.approx(0.8), 3)
    assert new.interval is not None
    # the seeds are 0.79, 0.80 and 0.81, each 0.02 to either side
    half = np.hypot(4.303 * 0.01 / np.sqrt(3), 0.02)
    assert new.interval.high - new.value == pytest.approx(half, rel=1e-3)


def test_seeds_that_saw_other_numbers_of_examples_are_no_model(tmp_path):
    rows = study({"kpm": [(1e-3, 0.8, 0.9)]}, seeds=2)
    rows[-1] = {**rows[-1], "n": 7}
    append_rows(tmp_path / "scores.jsonl", rows)
    with pytest.raises(
        CordaError, match=r"not measured alike .* the number of examples is \d+ and 7"
    ):
        read_results(tmp_path)


def test_the_report_and_the_card_say_so(tmp_path):
    rows = rows_of("base", BASE)
    for seed, kept in enumerate((0.85, 0.9, 0.95)):
        rows += [
            {**row, "gain": gain, "gain_low": gain - 0.01, "gain_high": gain + 0.01}
            for row in rows_of("kpm", at(0.8, kept), rate=1e-3, seed=seed)
            for gain in [row["value"] - BASE[row["task"]]]
        ]
    append_rows(tmp_path / "scores.jsonl", rows)
    page, _ = write_comparison(
        BeforeAfterOptions(
            before=[str(tmp_path)], after=[str(tmp_path)], output=str(tmp_path / "out")
        )
    )
    (model,) = json.loads(page.with_name("card.json").read_text())["after"]
    assert model["name"] == tmp_path.name
    assert {(one["interval"], one["seeds"]) for one in model["tasks"]} == {("over seeds", 3)}
    kept = model["kept_share"]
    assert kept["value"] == pytest.approx(0.9)
    assert kept["low"] < 0.85
    assert kept["high"] > 0.95
    assert "Over seeds: the mean over trainings" in page.with_name("report.md").read_text()


@pytest.mark.parametrize("count", [2, 3, 11, 30])
def test_the_interval_covers_seeds_and_samples(count):
    """of normal numbers it holds the truth in about 95 % of all cases, whichever of the two spreads"""
    generator = np.random.default_rng(0)
    for spread, noise in ((1.0, 0.0), (0.3, 1.0)):
        covered = 0
        for _ in range(600):
            shared = noise * generator.standard_normal()  # all seeds see the same examples
            values = spread * generator.standard_normal(count) + shared
            own = [Interval(v, v - 1.96 * noise, v + 1.96 * noise) for v in values]
            found = mean_interval(list(values), own)
            covered += found.low <= 0 <= found.high
        assert covered / 600 > 0.92


def test_of_seeds_without_intervals_the_spread_counts():
    found = mean_interval([0.4, 0.6], [None, None])
    assert found.value == 0.5
    assert found.high - 0.5 == pytest.approx(12.706 * 0.1)
