"""Scores: intervals that cover, differences that pair, and a file that survives a kill."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corda_vlm.errors import CordaError, DataError, ForeignFileError
from corda_vlm.evaluation.bootstrap import bootstrap, paired_difference
from corda_vlm.evaluation.score_file import append_rows, done, read_rows, score_row
from corda_vlm.evaluation.scores import Outcome, Score


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


def test_an_outcome_becomes_a_score() -> None:
    score = Outcome("top1", np.array([1.0, 0.0]), chance=0.1).score("digits", "gain")
    assert score == Score("digits", "top1", 0.5, 0.0, 1.0, 2, "gain", 0.1)


# ------------------------------------------------------------------ the file


def row(task: str = "digits", metric: str = "top1", value: float = 0.5, **model: object) -> dict:
    return score_row(
        Score(task, metric, value, 0.4, 0.6, 100, "gain"), run="demo", method="lora",
        **{"learning_rate": 1e-3, "seed": 0, **model},  # type: ignore[arg-type]
    )  # fmt: skip


def test_rows_come_back_and_say_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "run" / "scores.jsonl"
    append_rows(path, [row(), row(metric="top5")])
    append_rows(path, [row(seed=1), row(scale=0.5), row("old", seconds=1.5)])
    rows = read_rows(path)
    assert rows[0] == row()
    assert {"run", "method", "learning_rate", "seed", "scale", "steps", "task", "metric", "value", "low",
            "high", "n", "role", "seconds"} <= set(rows[0])  # fmt: skip
    lora = {"method": "lora", "learning_rate": 1e-3}
    assert done(rows, **lora, seed=0) == {("digits", "top1"), ("digits", "top5"), ("old", "top1")}
    assert done(rows, **lora, seed=1) == {("digits", "top1")}
    assert done(rows, **lora, seed=0, scale=0.5) == {("digits", "top1")}
    assert done(rows, method="full", learning_rate=1e-3, seed=0) == set()


@pytest.mark.parametrize("cut", [1, 20])
def test_a_torn_last_line_is_reported_and_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    path = tmp_path / "scores.jsonl"
    append_rows(path, [row(value=0.1), row(value=0.2)])
    path.write_bytes(path.read_bytes()[: -1 - cut])
    with caplog.at_level(logging.WARNING):
        assert [r["value"] for r in read_rows(path)] == [0.1]
    assert "cut short" in caplog.text
    append_rows(path, [row(value=0.3)])
    assert [r["value"] for r in read_rows(path)] == [0.1, 0.3]


def test_only_a_newline_lost_loses_no_row(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    append_rows(path, [row(value=0.1)])
    path.write_bytes(path.read_bytes()[:-1])
    assert len(read_rows(path)) == 1
    append_rows(path, [row(value=0.2)])
    assert [r["value"] for r in read_rows(path)] == [0.1, 0.2]


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(row()) + "\nnonsense\n" + json.dumps(row()) + "\n")
    with pytest.raises(ForeignFileError, match="line 2"):
        read_rows(path)
    path.write_text('{"step": 1}\n')
    with pytest.raises(ForeignFileError, match="no method, metric, task, value"):
        read_rows(path)
    with pytest.raises(ForeignFileError, match="no scores at"):
        read_rows(tmp_path / "absent.jsonl")
    assert read_rows(tmp_path / "absent.jsonl", missing_ok=True) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", 3), ("method", ""), ("method", None), ("task", ["digits"]), ("metric", {"top1": 1}), ("value", "0.5"),
        ("value", True), ("value", None), ("value", 10**400), ("learning_rate", "fast"), ("seed", 0.5), ("seed", [0]),
        ("scale", "half"), ("low", "0"), ("high", []), ("n", "many"), ("chance", {}), ("forecast", "none"), ("role", "gian"),
        ("role", ["gain"]),
    ],
)  # fmt: skip
def test_a_wrong_type_is_named_with_its_line(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps(row()) + "\n" + json.dumps({**row(), field: value}) + "\n")
    with pytest.raises(
        ForeignFileError, match=rf"scores\.jsonl, line 2, is not a score: its {field} is "
    ):
        read_rows(path)


def test_nan_is_refused_and_nothing_written(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    append_rows(path, [row()])
    with pytest.raises(CordaError, match="cannot be written as JSON"):
        append_rows(path, [row(), row(value=float("nan"))])
    assert len(read_rows(path)) == 1


def test_a_full_disk_leaves_the_rows_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    path = tmp_path / "scores.jsonl"
    append_rows(path, [row(value=0.1)])
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:10]))
    with pytest.raises(CordaError, match="free some space"):
        append_rows(path, [row(value=0.2)])
    monkeypatch.undo()
    assert [r["value"] for r in read_rows(path)] == [0.1]
