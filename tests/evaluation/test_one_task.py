"""Data alone as a suite."""

from __future__ import annotations

import json

import pytest

from corda_vlm import evaluate
from corda_vlm.__main__ import main
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation import load_suite
from corda_vlm.evaluation.one_task import data_of


@pytest.mark.parametrize(
    ("source", "kind", "name"),
    [
        ("folder:photos/test", "zero_shot", "test"),
        ("sklearn:digits", "zero_shot", "digits"),
        ({"source": "sklearn:digits", "split": "test"}, "zero_shot", "digits-test"),
        ("parquet:model_zoo/emoji-clip/data/*.parquet", "zero_shot", "data"),
        ("{source: 'jsonl:my qa.jsonl', format: qa}", "qa", "my-qa"),
        ({"source": "json:talk.json", "format": "llava"}, "qa", "talk"),
        ({"source": "text:docs/*.txt", "format": "text"}, "perplexity", "docs"),
    ],
)
def test_the_kind_of_a_task_is_that_of_its_data(source, kind, name) -> None:
    (task,) = load_suite(source).tasks
    assert (task.kind, task.name, task.role) == (kind, name, "gain")


def test_what_is_no_data_is_a_suite(tmp_path) -> None:
    assert data_of("emoji") is None
    assert data_of("folder/suite.yaml") is None
    assert data_of({"name": "s", "version": 1}) is None
    with pytest.raises(UnknownNameError, match="suite"):
        load_suite("foldr:photos")
    with pytest.raises(CordaError, match="YAML"):
        load_suite("{source: [}")
    with pytest.raises(UnknownNameError, match="data option"):
        load_suite({"source": "folder:photos", "fromat": "qa"})


def test_a_folder_of_pictures_is_measured(tiny_open_clip, tiny_processor, colour_folder) -> None:
    (score,) = evaluate(tiny_open_clip, f"folder:{colour_folder}", processor=tiny_processor)
    assert (score.task, score.metric, score.n) == ("colours", "top1", 12)
    assert score.chance == pytest.approx(1 / 3)


def test_the_verb_takes_data(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    main(["evaluate", "emoji-clip", "sklearn:digits", "--limit", "20", "--output", "scores.jsonl"])
    row = json.loads((tmp_path / "scores.jsonl").read_text())
    assert (row["task"], row["n"]) == ("digits", 20)
    with pytest.raises(SystemExit):
        main(["evaluate", "emoji-clip", "folder:none"])
    assert "none" in capsys.readouterr().err
