"""Suites: read from YAML, extended, and refused with the choices where something is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation import Suite, evaluate, load_suite
from corda_vlm.families.base import Loaded
from tests.evaluation.conftest import suite_of


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
