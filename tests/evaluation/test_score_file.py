"""The file of scores: rows come back, what is damaged is named, and a trained model's tell how far it is above the base."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from corda_vlm.errors import CordaError, ForeignFileError, NotFiniteError
from corda_vlm.evaluation import add_result
from corda_vlm.evaluation.bootstrap import paired_difference
from corda_vlm.evaluation.measure import encoder_of, measure
from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.evaluation.score_file import (
    append_rows,
    done,
    examples_path,
    gain_of,
    read_rows,
    score_row,
)
from corda_vlm.evaluation.scores import Score
from corda_vlm.families.base import Loaded
from corda_vlm.report.analysis.results import Results


def suite_of(folder: Path) -> dict[str, Any]:
    task = {
        "name": "colours", "role": "gain", "kind": "zero_shot", "data": f"folder:{folder}",
        "classes": ["red", "green", "blue"], "templates": ["a {} picture"], "metrics": ["top1", "mean_per_class"],
    }  # fmt: skip
    return {
        "name": "test",
        "version": 1,
        "tasks": [task, {**task, "name": "again", "role": "retention"}],
    }


def changed(loaded: Loaded, by: float) -> Loaded:
    model: Any = copy.deepcopy(loaded.model)
    with torch.no_grad():
        model.visual_projection.weight.add_(by * torch.randn_like(model.visual_projection.weight))
    return Loaded(model, loaded.processor, loaded.family, "changed")


def test_a_trained_models_rows_say_how_far_it_is_above_the_base(
    loaded: Loaded, colour_folder: Path, tmp_path: Path
) -> None:
    path, suite = tmp_path / "scores.jsonl", suite_of(colour_folder)
    base = list(measure(encoder_of(loaded), suite))
    other = list(measure(encoder_of(changed(loaded, 1.0)), suite))
    for result in base:
        assert len(add_result(path, result, run="r", method="base")) == 2
    for result in other:
        rows = add_result(path, result, run="r", method="lora", learning_rate=1e-3, seed=0)
        first = paired_difference(result.outcomes[0].values, base[0].outcomes[0].values)
        gain = gain_of(rows[0])
        assert gain == first
        assert rows[0]["value"] - base[0].scores[0].value == pytest.approx(gain.value)
    before = path.read_bytes(), examples_path(path).read_bytes()
    for result, labels in (
        (base[0], {"method": "base"}),
        (other[0], {"method": "lora", "learning_rate": 1e-3, "seed": 0}),
    ):
        assert add_result(path, result, run="r", **labels) == [], (
            "what it has already is not added again"
        )
    assert (path.read_bytes(), examples_path(path).read_bytes()) == before
    results = Results.of(read_rows(path))
    assert len(results.gains) == 2


def test_no_gain_without_the_base_or_on_other_examples(
    loaded: Loaded, colour_folder: Path, tmp_path: Path
) -> None:
    suite = suite_of(colour_folder)
    result = next(measure(encoder_of(loaded), suite))
    assert gain_of(add_result(tmp_path / "alone.jsonl", result, run="r", method="lora")[0]) is None
    add_result(
        tmp_path / "few.jsonl",
        next(measure(encoder_of(loaded), suite, EvalOptions(limit=5))),
        run="r",
        method="base",
    )
    assert gain_of(add_result(tmp_path / "few.jsonl", result, run="r", method="lora")[0]) is None
    examples_path(tmp_path / "few.jsonl").write_text('{"task": 1}\n')
    with pytest.raises(ForeignFileError, match=r"few-base-examples\.jsonl, line 1"):
        add_result(tmp_path / "few.jsonl", result, run="r", method="full")


def test_a_model_that_diverged_adds_no_row(
    loaded: Loaded, colour_folder: Path, tmp_path: Path
) -> None:
    broken = changed(loaded, float("nan"))
    with pytest.raises(
        NotFiniteError, match=r"task colours of suite test: .*12 of 12 images.*float32"
    ):
        for result in measure(encoder_of(broken), suite_of(colour_folder)):
            add_result(tmp_path / "scores.jsonl", result, run="r", method="lora")
    assert not (tmp_path / "scores.jsonl").exists()


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
