"""Rows are added with what the base model did on the same examples; a model that diverged adds none."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corda_vlm.errors import CordaError, ForeignFileError, NotFiniteError
from corda_vlm.evaluation import add_result, read_rows
from corda_vlm.evaluation.bootstrap import paired_difference
from corda_vlm.evaluation.diverged import note_diverged, read_diverged
from corda_vlm.evaluation.measure import encoder_of, measure
from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.evaluation.score_file import examples_path, gain_of
from corda_vlm.evaluation.scores import Outcome, paired_gain
from corda_vlm.families import detect_family
from corda_vlm.families.base import Loaded
from corda_vlm.report.analysis.results import Results
from corda_vlm.report.tables import trained_table


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


@pytest.fixture
def loaded(tiny_clip_hf, tiny_processor) -> Loaded:
    return Loaded(tiny_clip_hf, tiny_processor, detect_family(tiny_clip_hf), "tiny")


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


def test_paired_gains_by_hand() -> None:
    base = Outcome("top1", np.array([1.0, 0, 0, 0]))
    gain = paired_gain(Outcome("top1", np.array([1.0, 1, 0, 1])), base)
    assert gain is not None
    assert gain.value == 0.5
    logs = np.log([0.5, 0.25])
    gain = paired_gain(
        Outcome("token_probability", logs + 0.1, exp=True),
        Outcome("token_probability", logs, exp=True),
    )
    level = math.exp(logs.mean())
    assert gain is not None
    assert (gain.value, gain.low, gain.high) == pytest.approx((level * (math.exp(0.1) - 1),) * 3)
    grouped = Outcome("top1", base.values, groups=np.array([0, 0, 1, 1]))
    assert paired_gain(grouped, base) is None
    assert paired_gain(base, Outcome("top1", np.array([1.0]))) is None


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


def test_trainings_that_diverged_are_listed_and_count_for_nothing(
    invented: Any, tmp_path: Path
) -> None:
    run = invented.write_run(tmp_path / "run", invented.study(invented.DEMO))
    rows = invented.rows_of(
        "lora", {"new": 0.99}, rate=1.0, seed=0
    )  # measured on one task, then NaN
    rows += invented.rows_of("full", invented.at(0.95, 0.9), rate=1.0, seed=1)
    with (run / "scores.jsonl").open("a") as file:
        import json

        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert read_diverged(run) == {}
    note_diverged(run, method="lora", learning_rate=1.0, seed=0, reason="the loss is nan")
    note_diverged(run, method="full", learning_rate=1.0, seed=0, reason="the loss is nan")
    note_diverged(run, method="dora", learning_rate=2.0, seed=0, reason="the loss is nan")
    results = Results.read(run)
    assert results.best_setting("lora").learning_rate == 4e-3  # type: ignore[union-attr]
    assert results.best_setting("full").learning_rate == 1e-3, "one of its seeds diverged"  # type: ignore[union-attr]
    table = trained_table(results)
    told = {(row[0], row[1]): row for row in table.rows}
    assert told["lora", "1"][2:] == ["–", "–", "–", "diverged"]
    assert told["full", "1"][-1] == "diverged in 1 of 2 seeds"
    assert told["dora", "2"][-1] == "diverged"
    assert "became NaN or Inf, which is no score" in table.caption
    (run / "diverged.jsonl").write_text('{"method": 3}\n')
    with pytest.raises(CordaError, match="line 1, is not a diverged training: its method is 3"):
        Results.read(run)
