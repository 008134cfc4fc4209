"""A model measured on a suite, task by task."""

from __future__ import annotations

from pathlib import Path

import pytest

from corda_vlm.errors import CordaError, DataError, UnknownNameError
from corda_vlm.evaluation import Cache, evaluate, load_suite
from corda_vlm.evaluation.measure import encoder_of, measure
from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.families.base import Loaded
from tests.evaluation.conftest import suite_of


def test_measured_from_end_to_end(
    loaded: Loaded, colour_folder: Path, colour_parquet: Path
) -> None:
    suite = suite_of(colour_folder)
    suite["tasks"].append(
        {"name": "captions", "role": "gain", "kind": "retrieval", "metrics": ["image_to_text_recall@5"],
         "data": {"source": f"parquet:{colour_parquet}", "text": "captions"}}
    )  # fmt: skip
    scores = evaluate(loaded, suite)
    assert [(s.task, s.metric, s.role, s.n) for s in scores] == [
        ("colours", "top1", "retention", 12),
        ("colours", "mean_per_class", "retention", 12),
        ("captions", "image_to_text_recall@5", "gain", 12),
    ]
    for score in scores:
        assert 0 <= score.low <= score.value <= score.high <= 1
    assert scores[0].chance == pytest.approx(1 / 3)
    assert evaluate(loaded.model, suite, processor=loaded.processor, family="clip_hf") == scores


def test_tasks_come_one_by_one_and_a_run_resumes(loaded: Loaded, colour_folder: Path) -> None:
    content = suite_of(colour_folder)
    content["tasks"].append({**content["tasks"][0], "name": "again", "limit": 5, "metrics": "top1"})
    suite = load_suite(content)
    results = measure(encoder_of(loaded), suite)
    first = next(results)
    assert first.task.name == "colours"
    assert len(first.outcomes[0].values) == 12
    assert suite.remaining(()) == ["colours", "again"]
    half = {(s.task, s.metric) for s in first.scores[:1]}
    assert suite.remaining(half) == ["colours", "again"], (
        "a task cut short in the middle is measured again"
    )
    known = {(s.task, s.metric) for s in first.scores}
    assert suite.remaining(known) == ["again"]
    rest = list(measure(encoder_of(loaded), suite, EvalOptions(tasks=suite.remaining(known))))
    assert [r.task.name for r in rest] == ["again"]
    assert rest[0].scores[0].n == 5
    assert evaluate(loaded, suite, limit=3)[0].n == 3


def test_classes_from_the_data_and_from_other_data(loaded: Loaded, colour_folder: Path) -> None:
    own = suite_of(colour_folder, classes={"from": "data", "count": 3})
    few = suite_of(
        colour_folder,
        data={"source": f"folder:{colour_folder}", "where": {"class_name": ["red", "green"]}},
        classes={"from": {"source": f"folder:{colour_folder}"}, "count": 3},
    )
    by_list = suite_of(colour_folder, classes=["red", "blue", "green"])
    assert evaluate(loaded, own) == evaluate(loaded, by_list), (
        "matched by name, so the order is no matter"
    )
    score = evaluate(loaded, few)[0]
    assert (score.n, score.chance) == (8, pytest.approx(1 / 3))
    with pytest.raises(DataError, match="3 class names, but the suite says 4"):
        evaluate(loaded, suite_of(colour_folder, classes={"from": "data", "count": 4}))
    for bad in ({"count": 3}, {"from": "data", "names": "cifar10"}):
        with pytest.raises(CordaError, match="either 'from' or 'names'"):
            evaluate(loaded, suite_of(colour_folder, classes=bad))


def test_a_study_decodes_its_images_once(loaded: Loaded, colour_folder: Path) -> None:
    cache = Cache()
    first = evaluate(loaded, suite_of(colour_folder), cache=cache)
    for file in colour_folder.rglob("*.png"):
        file.unlink()
    assert evaluate(loaded, suite_of(colour_folder), cache=cache) == first


def test_data_root_and_missing_data(
    loaded: Loaded, colour_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = suite_of(colour_folder, data="folder:{data_root}/colours")
    absent = {
        **content["tasks"][0],
        "name": "absent",
        "data": {"source": "torchvision:CIFAR10", "root": "{data_root}/x"},
    }
    content["tasks"].append(absent)
    with pytest.raises(DataError, match=r"task colours of suite test.*nowhere/colours"):
        evaluate(loaded, {**content, "data_root": "nowhere"})
    root = colour_folder.parent
    with pytest.raises(DataError, match="task absent of suite test"):
        evaluate(loaded, content, data_root=root)
    scores = evaluate(loaded, content, data_root=root, missing="skip")
    assert {s.task for s in scores} == {"colours"}
    assert "task absent is left out" in caplog.text
    with pytest.raises(DataError, match="no task of suite test has its data under 'nowhere'"):
        evaluate(loaded, content, data_root="nowhere", missing="skip")


def test_undecodable_images_are_counted(
    loaded: Loaded, colour_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (colour_folder / "red" / "0.png").write_bytes(b"not a picture")
    spec = {"source": f"folder:{colour_folder}", "max_bad_share": 0.1}
    assert evaluate(loaded, suite_of(colour_folder, data=spec))[0].n == 11
    assert "1 record is left out, the first" in caplog.text
    with pytest.raises(DataError, match="do not decode"):
        evaluate(loaded, suite_of(colour_folder))


def test_what_evaluate_refuses(loaded: Loaded, colour_folder: Path) -> None:
    suite = suite_of(colour_folder)
    with pytest.raises(UnknownNameError, match="task of suite test 'colors'"):
        evaluate(loaded, suite, tasks=["colors"])
    with pytest.raises(CordaError, match=r"evaluate needs the processor.*CLIPModel.*load_model"):
        evaluate(loaded.model, suite)
    with pytest.raises(UnknownNameError, match="unknown missing"):
        evaluate(loaded, suite, missing="ignore")
