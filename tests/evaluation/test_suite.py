"""Suites: read, refused with the choices, measured from end to end, and resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from corda_vlm.errors import CordaError, DataError, UnknownNameError
from corda_vlm.evaluation import Cache, Suite, evaluate, load_suite
from corda_vlm.evaluation.measure import encoder_of, measure
from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.families import detect_family
from corda_vlm.families.base import Loaded


def suite_of(folder: Path, **changes: Any) -> dict[str, Any]:
    task = {
        "name": "colours", "role": "retention", "kind": "zero_shot", "data": f"folder:{folder}",
        "classes": ["red", "green", "blue"], "templates": ["a {} picture"], "metrics": ["top1", "mean_per_class"],
    }  # fmt: skip
    return {"name": "test", "version": 1, "tasks": [{**task, **changes}]}


@pytest.fixture
def loaded(tiny_clip_hf, tiny_processor) -> Loaded:
    return Loaded(tiny_clip_hf, tiny_processor, detect_family(tiny_clip_hf), "tiny")


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


def test_a_suite_is_a_name_a_path_a_mapping_or_itself(
    loaded: Loaded, colour_folder: Path, tmp_path: Path
) -> None:
    content = suite_of(
        colour_folder, data="folder:colours", templates="words.txt", classes="names.yaml"
    )
    folder = tmp_path / "suites"
    folder.mkdir()
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    (folder / "words.txt").write_text("the {}\n")
    (folder / "names.yaml").write_text("{red: red, green: green, blue: blue, grey: grey}")
    colour_folder.rename(folder / "colours")
    suite = load_suite(folder / "mine.yaml")
    assert load_suite(suite) is suite
    score = evaluate(loaded, suite)[0]  # data, names and templates lie beside the suite
    assert score.n == 12
    assert score.chance == pytest.approx(1 / 4)
    assert load_suite("emoji-digits").name == "emoji-digits"


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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"role": "gains"}, "unknown role.*gain, retention.*Did you mean 'gain'"),
        ({"kind": "zeroshot"}, "unknown kind.*retrieval, vqa, zero_shot"),
        ({"metrics": ["top2"]}, "unknown metric.*mean_per_class, top1, top5"),
        ({"template": "x"}, "unknown key in the suite given, task 1 .colours. 'template'.*Did you mean 'templates'"),
        ({"templates": None}, "needs templates"),
        ({"classes": None}, "needs classes"),
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"data": ["x"]}, "data must be a string"),
        ({"kind": "retrieval", "metrics": None}, "takes no classes"),
        ({"name": None}, "no 'name'"),
    ],
)  # fmt: skip
def test_a_wrong_suite_is_refused_with_the_choices(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(CordaError, match=told):
        load_suite(suite_of(tmp_path, **change))


def test_a_suite_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown suite 'emoji-digit'.*Did you mean 'emoji-digits'"
    ):
        load_suite("emoji-digit")
    with pytest.raises(CordaError, match="no 'version'"):
        load_suite({"name": "x", "tasks": []})
    with pytest.raises(CordaError, match="at least one task"):
        load_suite({"name": "x", "version": 1, "tasks": []})
    content = suite_of(tmp_path)
    with pytest.raises(CordaError, match="two tasks have one name"):
        load_suite({**content, "tasks": content["tasks"] * 2})
    with pytest.raises(UnknownNameError, match="colour_space"):
        load_suite({**content, "colour_space": 1})
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(CordaError, match="is not YAML"):
        load_suite(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(CordaError, match="must be a mapping"):
        load_suite(tmp_path / "list.yaml")


def test_what_evaluate_refuses(loaded: Loaded, colour_folder: Path) -> None:
    suite = suite_of(colour_folder)
    with pytest.raises(UnknownNameError, match="task of suite test 'colors'"):
        evaluate(loaded, suite, tasks=["colors"])
    with pytest.raises(CordaError, match=r"evaluate needs the processor.*CLIPModel.*load_model"):
        evaluate(loaded.model, suite)
    with pytest.raises(UnknownNameError, match="unknown missing"):
        evaluate(loaded, suite, missing="ignore")


def test_a_suite_extends_another(loaded: Loaded, colour_folder: Path, tmp_path: Path) -> None:
    below, above = tmp_path / "below", tmp_path / "above"
    for folder in (below, above):
        folder.mkdir()
    colour_folder.rename(below / "colours")
    content = suite_of(colour_folder, data="folder:colours")
    content["tasks"].append({**content["tasks"][0], "name": "other"})
    content["data_root"] = "somewhere"
    (below / "parent.yaml").write_text(yaml.safe_dump(content))
    child = {"name": "child", "version": 2, "extends": "../below/parent.yaml", "tasks": [
        {**content["tasks"][0], "name": "other", "role": "gain", "data": f"folder:{below / 'colours'}"},
        {**content["tasks"][0], "name": "third", "limit": 2, "data": f"folder:{below / 'colours'}"},
    ]}  # fmt: skip
    (above / "child.yaml").write_text(yaml.safe_dump(child))
    suite = load_suite(above / "child.yaml")
    assert [(t.name, t.role) for t in suite.tasks] == [
        ("colours", "retention"), ("other", "gain"), ("third", "retention"),
    ]  # fmt: skip
    assert (suite.name, suite.version, suite.data_root) == ("child", 2, "somewhere")
    # The parent's paths stay relative to the parent.
    assert [s.n for s in evaluate(loaded, suite) if s.metric == "top1"] == [12, 12, 2]

    (below / "parent.yaml").write_text(
        yaml.safe_dump({**content, "extends": "../above/child.yaml"})
    )
    with pytest.raises(CordaError, match="extends itself"):
        load_suite(above / "child.yaml")
    with pytest.raises(
        UnknownNameError, match=r"unknown suite 'zero-shots'.*Did you mean 'zero-shot'"
    ):
        load_suite({**child, "extends": "zero-shots"})


def test_suites_are_frozen() -> None:
    suite = load_suite("emoji-digits")
    assert isinstance(suite, Suite)
    with pytest.raises(dataclasses.FrozenInstanceError):
        suite.name = "other"  # type: ignore[misc]


WRONG = [
    None, -1, True, "", [[]], {"a": 1}, [None], [3.5], "a\0b", "a\nb", "x" * 5000, float("nan"), 10**400, "~nosuch/x",
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:20])
def test_values_of_wrong_types_are_told(wrong: Any, tmp_path: Path) -> None:
    """Whatever stands at any key: it is read, or refused in words."""
    zero_shot = suite_of(tmp_path)["tasks"][0]
    asked = {
        "name": "asked",
        "role": "gain",
        "kind": "qa",
        "data": "x",
        "options": {"max_new_tokens": 3},
    }
    for place in (None, 0, 1):
        keys = ["name", "version", "tasks", "about", "data_root", "extends", "zz", 3]
        if place is not None:
            keys = [*zero_shot, "role", "kind", "limit", "options", 3]
        for key in keys:
            content = {"name": "n", "version": 1, "tasks": [dict(zero_shot), dict(asked)]}
            (content if place is None else content["tasks"][place])[key] = wrong  # type: ignore[index]
            message = refusal(content)
            assert len(message) < 2000
            assert message or key not in (3, "zz", "kind", "role", "tasks")


def refusal(content: dict[str, Any]) -> str:
    """What is wrong with a suite, in words."""
    try:
        load_suite(content)
    except CordaError as error:
        return str(error)
    return ""
