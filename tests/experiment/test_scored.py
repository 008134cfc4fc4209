"""The scores of a training are found where `run` and `evaluate` write them. All numbers are invented."""

from __future__ import annotations

from pathlib import Path

import pytest

from corda_vlm.__main__ import main
from corda_vlm.adapter import attach_adapter
from corda_vlm.errors import CordaError
from corda_vlm.evaluation.score_file import append_rows
from corda_vlm.experiment.scored import scores_of
from corda_vlm.families import load_model
from corda_vlm.plan import plan_adapter
from tests.report.invented import BASE, at, rows_of, study


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder as a run leaves it, with two rates and seeds of one variant."""
    folder = tmp_path / "run"
    (folder / "kpm" / "0.001-1" / "weights").mkdir(parents=True)
    (folder / ".corda_vlm.run").write_text("{}")
    rows = study({"kpm": [(1e-3, 0.8, 0.9), (2e-3, 0.9, 0.5)]})
    scaled = rows_of("kpm", at(0.5, 0.95), rate=1e-3, seed=1, scale=0.5)
    append_rows(folder / "scores.jsonl", rows + scaled)
    return folder


def test_a_training_of_a_run_is_found_by_its_folder(run):
    for folder in (run / "kpm" / "0.001-1", run / "kpm" / "0.001-1" / "weights"):
        found = scores_of(folder)
        assert found is not None
        assert found.path == run / "scores.jsonl"
        assert found.which == {"method": "kpm", "learning_rate": 1e-3, "seed": 1, "scale": 1.0}


def test_what_evaluate_was_told_to_write_into_the_folder_is_found(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    assert scores_of(folder) is None
    append_rows(folder / "scores.jsonl", rows_of("base", BASE) + rows_of("other", at(0.8, 0.9)))
    assert scores_of(folder) is None, "there are none of this adapter"
    append_rows(folder / "scores.jsonl", rows_of("adapter", at(0.8, 0.9)))
    found = scores_of(folder)
    assert found is not None
    assert found.which["method"] == "adapter"


def test_a_folder_that_only_looks_like_one_of_a_run_has_none(run):
    (run / "kpm" / "0.0010-1").mkdir()
    (run / "kpm" / "best").mkdir()
    (run / "kpm" / "0.004-0").mkdir()  # not measured
    for name in ("0.0010-1", "best", "0.004-0"):
        assert scores_of(run / "kpm" / name) is None
    (run / ".corda_vlm.run").unlink()
    assert scores_of(run / "kpm" / "0.001-1") is None


def test_a_damaged_file_is_told(run):
    (run / "scores.jsonl").write_text("{nothing\n")
    with pytest.raises(CordaError, match="scores"):
        scores_of(run / "kpm" / "0.001-1")


def test_export_writes_them_into_the_card_without_being_asked(run, tmp_path, capsys):
    loaded = load_model("emoji-clip")
    plan = plan_adapter(loaded.model, None, method="pissa", rank=2, show_progress=False)
    weights = run / "kpm" / "0.001-1" / "weights"
    attach_adapter(loaded.model, plan).save_pretrained(weights)
    main(["export", "emoji-clip", str(weights.parent), str(tmp_path / "out"), "--format", "merged"])
    assert f"its card has the scores of {run / 'scores.jsonl'}" in capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| new | gain | top1 | 10.0% | 80.5% |" in text
    assert "89.5% |" in text
