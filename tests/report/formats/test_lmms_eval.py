"""lmms-eval's files, in the form that its own evaluation tracker writes: it does not install beside what is tested here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corda_vlm.errors import ForeignFileError
from corda_vlm.report.before_after.comparison import compare_models
from corda_vlm.report.before_after.options import Roles
from corda_vlm.report.formats.registry import read_results

DATE = "20260801_120000"


def sample(number: int, **metrics) -> dict:
    """As `save_results_samples` writes it: no name of a filter, and the document as a digest."""
    return {
        "doc_id": number, "target": "yes", "filtered_resps": "yes", "token_counts": None, "doc_hash": f"hash{number}",
        "input": f"Is it {number}?", **metrics,
    }  # fmt: skip


def write(folder: Path, right: list[int], scores: list[float], date: str = DATE) -> Path:
    """POPE, whose samples have an accuracy and dicts for the other metrics, and a task with a score of 0 to 100."""
    model = folder / "lmms-lab__llava"
    model.mkdir(parents=True, exist_ok=True)
    f1 = {"question_id": "1", "score": 1.0, "prediction": "yes", "ground_truth": "yes"}
    pope = [
        sample(n, pope_accuracy={**f1, "score": one}, pope_f1_score=f1)
        for n, one in enumerate(right)
    ]
    vqa = [sample(n, relaxed_overall=one, submission={"id": n}) for n, one in enumerate(scores)]
    for task, rows in (("pope", pope), ("chartqa", vqa)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (model / f"{date}_samples_{task}.jsonl").write_text(lines)
    results = {
        "results": {
            "pope": {
                "alias": "pope", "pope_accuracy,none": sum(right) / len(right), "pope_accuracy_stderr,none": "N/A",
                "pope_accuracy_stderr_clt,none": 0.1, "pope_f1_score,none": 0.77, "paired_baseline": "x", "paired_pvalue": 0.5,
            },
            "chartqa": {"alias": "chartqa", "relaxed_overall,none": sum(scores) / len(scores), "relaxed_overall_stderr,none": 0.05},
        },
        "group_subtasks": {"pope": [], "chartqa": []},
        "configs": {"pope": {"output_type": "generate_until"}, "chartqa": {"output_type": "generate_until"}},
        "versions": {"pope": 0.0, "chartqa": 0.0},
        "n-shot": {"pope": 0, "chartqa": 0},
        "higher_is_better": {"pope": {"pope_accuracy": True, "pope_f1_score": True}, "chartqa": {"relaxed_overall": True}},
        "n-samples": {"pope": {"original": 4, "effective": 4}, "chartqa": {"original": 3, "effective": 3}},
        "lmms_eval_version": "0.7.2", "date": date, "model_name": "lmms-lab/llava",
    }  # fmt: skip
    (model / f"{date}_results.json").write_text(json.dumps(results, indent=2))
    return folder


def test_scores_in_numbers_and_in_dicts_pair_by_document(tmp_path):
    (before,) = read_results(write(tmp_path / "a", [1, 1, 1, 0], [1.0, 0.5, 0.0]))
    (after,) = read_results(write(tmp_path / "b", [1, 0, 1, 0], [1.0, 0.5, 0.0]))
    assert before.name == "llava"
    assert before.metrics("pope") == ["pope_accuracy", "pope_f1_score"]
    pope = before.of("pope")
    assert (pope.value, pope.n, pope.chance) == (0.75, 4, 0.5)
    (one,) = compare_models(before, [after], Roles())
    assert [(of.task, of.how, of.guessed) for of in one.changes] == [
        ("pope", "paired", False), ("chartqa", "paired", True)
    ]  # fmt: skip


def test_a_score_over_all_samples_has_none_of_its_own(tmp_path):
    (model,) = read_results(write(tmp_path, [1, 1, 1, 0], [1.0]))
    assert model.of("pope", "pope_f1_score").samples is None


def test_samples_of_several_filters_without_their_names_are_left_out(tmp_path):
    folder = write(tmp_path, [1, 0], [1.0, 0.0])
    file = next(folder.rglob("*_samples_chartqa.jsonl"))
    file.write_text(file.read_text() * 2)  # a second filter
    (model,) = read_results(folder)
    assert model.of("chartqa").samples is None
    assert model.of("chartqa").interval is not None  # by its standard error


def test_of_two_runs_the_last_counts(tmp_path):
    write(tmp_path, [1, 1], [1.0, 1.0])
    (model,) = read_results(write(tmp_path, [1, 0], [0.0, 1.0], date="20260802_080000"))
    assert model.of("pope").value == 0.5


def test_samples_alone_are_read_too(tmp_path):
    folder = write(tmp_path, [1, 0, 0, 0], [1.0])
    (model,) = read_results(next(folder.rglob("*_samples_pope.jsonl")))
    assert model.of("pope", "pope_accuracy").value == 0.25


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty; run the evaluation again"),
        ('{"results": {"pope": {"pope_acc', "may be truncated"),
        ('{"results": [1]}', "has no mapping `results`"),
    ],
)
def test_damaged_results(tmp_path, content, expected):
    folder = write(tmp_path, [1], [1.0])
    next(folder.rglob("*_results.json")).write_text(content)
    with pytest.raises(ForeignFileError, match=expected):
        read_results(folder)


def test_a_truncated_file_of_samples_names_its_line(tmp_path):
    folder = write(tmp_path, [1, 0], [1.0])
    file = next(folder.rglob("*_samples_pope.jsonl"))
    file.write_text(file.read_text()[:-30])
    with pytest.raises(
        ForeignFileError, match=r"samples_pope\.jsonl, line 2, is not a sample.*ends in the middle"
    ):
        read_results(folder)
