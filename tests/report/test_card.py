"""The card of an export says what was measured, for readers and in the formats of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from corda_vlm.errors import CordaError, ForeignFileError, UnknownNameError
from corda_vlm.report import write_card


def row(task: str, value: float, method: str = "base", **more: Any) -> dict[str, Any]:
    role = "gain" if task == "digits" else "retention"
    return {
        "run": "r", "method": method, "learning_rate": None if method == "base" else 1e-3, "seed": None, "scale": 1.0,
        "task": task, "metric": "top1", "value": value, "low": value - 0.01, "high": value + 0.01, "n": 200, "role": role,
        "chance": 0.1, **more,
    }  # fmt: skip


ROWS = [
    row("digits", 0.1),
    row("emoji", 0.9),
    row("emoji", 0.5, metric="top5", chance=0.6),
    row("digits", 0.95, "kpm"),
    row("emoji", 0.8, "kpm"),
    row("emoji", 0.7, "kpm"),  # measured again
    row("emoji", 0.45, "kpm", metric="top5", chance=0.6),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    report = {"format": "lora", "name": "digits-clip", "load": "load it so", "base_model": "owner/clip",
              "pipeline_tag": "zero-shot-image-classification", "original": {"method": "corda", "mode": "kpm", "rank": 8}}  # fmt: skip
    (tmp_path / "corda_export.json").write_text(json.dumps(report))
    return tmp_path


def test_before_and_after_and_the_share_that_was_kept(folder):
    write_card(folder, ROWS)
    card: Any = ModelCard.load(folder / "README.md")
    text = card.text
    assert "| digits | gain | top1 | 10.0% | 95.0% | 94.0% to 96.0% | – |" in text
    assert "| emoji | retention | top1 | 90.0% | 70.0% | 69.0% to 71.0% | 75.0% |" in text
    # nothing above chance to keep
    assert "| emoji | retention | top5 | 50.0% | 45.0% | 44.0% to 46.0% | – |" in text
    assert "method `corda` in mode kpm, rank 8" in text
    assert "`load it so`" in text
    assert card.data.base_model == "owner/clip"
    assert card.data.library_name == "peft"
    found = {(e.dataset_type, e.metric_type): e.metric_value for e in card.data.eval_results}
    assert found == {("digits", "top1"): 0.95, ("emoji", "top1"): 0.7, ("emoji", "top5"): 0.45}
    assert not (folder / ".eval_results").exists()


def test_nothing_is_kept_of_a_perplexity_or_of_what_was_not_surely_known(folder):
    other = [
        row("text", 10.0, metric="perplexity", chance=0.0),
        row("text", 20.0, "kpm", metric="perplexity", chance=0.0),
        row("hard", 0.105),
        row("hard", 0.3, "kpm"),
    ]
    write_card(folder, [*ROWS, *other])
    text = (folder / "README.md").read_text()
    assert "| text | retention | perplexity | 10 | 20 | 19.99 to 20.01 | – |" in text
    assert "| hard | retention | top1 | 10.5% | 30.0% | 29.0% to 31.0% | – |" in text


def test_scores_on_data_sets_of_the_hub(folder):
    write_card(folder, ROWS, datasets={"emoji": "owner/emoji"})
    entries = yaml.safe_load((folder / ".eval_results" / "corda_vlm.yaml").read_text())
    assert entries == [
        {
            "dataset": {"id": "owner/emoji", "task_id": "emoji"},
            "value": 0.7,
            "notes": "top1, retention, n=200",
        }
    ]
    parse = getattr(huggingface_hub, "parse_eval_result_entries", None)
    if parse is not None:  # from version 1 on
        assert parse(entries)[0].dataset_id == "owner/emoji"


def test_one_model_of_several(folder):
    rows = [*ROWS, row("emoji", 0.6, "lora"), row("emoji", 0.65, "kpm", scale=0.5)]
    with pytest.raises(
        CordaError, match=r"scores of several: method='kpm'.*scale=1.0; method='lora'"
    ):
        write_card(folder, rows)
    write_card(folder, rows, method="kpm", scale=0.5)
    assert "| 65.0% |" in (folder / "README.md").read_text()
    with pytest.raises(CordaError, match="there are no scores of it: method='kpm'"):
        write_card(folder, rows, method="dora")
    with pytest.raises(CordaError, match="there are no scores of it: none"):
        write_card(folder, ROWS[:3])


def test_what_is_refused(folder, tmp_path_factory):
    with pytest.raises(UnknownNameError, match=r"unknown task 'emojis'.*Did you mean 'emoji'"):
        write_card(folder, ROWS, datasets={"emojis": "owner/emoji"})
    assert not (folder / "README.md").exists(), "nothing is written before all is checked"
    with pytest.raises(ForeignFileError, match=r"corda_export\.json"):
        write_card(tmp_path_factory.mktemp("other"), ROWS)
    (folder / "corda_export.json").write_text("{}")
    with pytest.raises(CordaError, match="is no export with a card"):
        write_card(folder, ROWS)
