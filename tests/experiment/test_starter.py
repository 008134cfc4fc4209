"""A first experiment for somebody's data: what is seen in the data, and that what is written can be run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image

from corda_vlm.__main__ import main
from corda_vlm.data import load_records
from corda_vlm.errors import CordaError, DataError
from corda_vlm.evaluation import load_suite, read_rows
from corda_vlm.experiment.load import load_experiment
from corda_vlm.experiment.starter import (
    CAPTIONS,
    CHOICES,
    CLASSES,
    LONG,
    TALK,
    TEXT,
    Machine,
    look_at,
    source_of,
    starter,
    write_starter,
)

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def photos(folder: Path, parts: Sequence[str] = ("",), count: int = 20) -> Path:
    for part in parts:
        for name, color in COLORS.items():
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                shade = tuple(value - number for value in color)
                Image.new("RGB", (24, 24), shade).save(folder / part / name / f"{number}.png")
    return folder


def lines(path: Path, row: Mapping[str, Any], count: int = 20) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
    return path


@pytest.mark.parametrize(
    ("row", "is_", "form"),
    [
        ({"question": "How many?", "answer": "two"}, TALK, "qa"),
        ({"question": "Which?", "choices": ["a", "b"], "answer": 1}, CHOICES, "qa"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A long and friendly answer to it."}]}, LONG, "chat"),
        ({"instruction": "Say it", "input": "", "output": "It is said here in some more words."}, LONG, "alpaca"),
        ({"prompt": "Two and two", "completion": " four"}, TALK, "prompt_completion"),
        ({"text": "A document of some words."}, TEXT, "text"),
    ],
)  # fmt: skip
def test_the_format_shows_in_the_columns(tmp_path, row, is_, form) -> None:
    looked = look_at(str(lines(tmp_path / "rows.jsonl", row)))
    assert (looked.is_, looked.spec["format"], looked.pictures) == (is_, form, False)
    assert looked.count == 16, "four of five are learned from"
    assert list(looked.parts) == ["train", "val", "test"]


def test_a_folder_of_pictures_has_classes_and_perhaps_parts(tmp_path) -> None:
    looked = look_at(str(photos(tmp_path / "plain")))
    assert (looked.is_, looked.classes, looked.count) == (CLASSES, ("blue", "green", "red"), 48)
    parted = look_at(str(photos(tmp_path / "parted", ["train", "val"], count=3)))
    assert (parted.count, parted.parts) == (
        9,
        {"train": {"split": "train"}, "test": {"split": "val"}},
    )
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    rows = lines(tmp_path / "rows.jsonl", {"image": "a.png", "caption": "Nothing to see"})
    assert look_at(str(rows)).is_ == CAPTIONS


def test_a_folder_with_train_alone_is_cut(tmp_path) -> None:
    looked = look_at(str(photos(tmp_path / "half", ["train"])))
    assert (looked.classes, looked.count) == (("blue", "green", "red"), 48)
    assert [len(load_records(looked.part(name))) for name in ("val", "test")] == [6, 6]


@pytest.mark.parametrize(
    ("splits", "counts"),
    [
        (["train", "validation", "test"], {"train": 20, "val": 20, "test": 20}),
        (["train", "validation"], {"train": 20, "test": 20}),
        (["train", "unsupervised"], {"train": 16, "val": 2, "test": 2}),
        (["everything"], {"train": 16, "val": 2, "test": 2}),
    ],
)
def test_a_data_set_of_a_hub(tmp_path, monkeypatch, splits, counts) -> None:
    monkeypatch.chdir(tmp_path)
    one = datasets.Dataset.from_dict({"text": [f"Document {n}" for n in range(20)]})
    whole = datasets.DatasetDict(dict.fromkeys(splits, one))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config=None: whole)
    looked = look_at("owner/name")
    assert {name: len(load_records(looked.part(name))) for name in looked.parts} == counts


def test_a_data_set_of_a_hub_whose_splits_say_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = datasets.DatasetDict(dict.fromkeys("ab", datasets.Dataset.from_dict({"text": ["x"]})))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config=None: whole)
    with pytest.raises(DataError, match="has the splits a, b, of which none is called train"):
        look_at("owner/name")


def test_nothing_is_written_that_cannot_be_read(tmp_path) -> None:
    looked = look_at(str(lines(tmp_path / "rows.jsonl", {"text": "A document of some words."})))
    experiment, suite = starter(
        "knowledge", looked, looked, model=None, machine=Machine(False), quick=False, folder=tmp_path / "new"
    )  # fmt: skip
    assert len({task["name"] for task in suite["tasks"]}) == 3
    twice = {**suite, "tasks": [*suite["tasks"], suite["tasks"][0]]}
    with pytest.raises(CordaError, match="knowledge"):
        write_starter(tmp_path / "new", experiment, twice, "corda-vlm new", False)
    assert not (tmp_path / "new").exists()
    write_starter(tmp_path / "new", experiment, suite, "corda-vlm new", False)


def test_a_suite_that_is_there_is_left(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "rows.jsonl", {"text": "A document of some words."})
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "suite.yaml").write_text("mine")
    with pytest.raises(SystemExit):
        main(["new", "rows.jsonl", "--knowledge", "rows.jsonl", "--output", "own"])
    assert "suite.yaml is there already" in capsys.readouterr().err
    assert (tmp_path / "own" / "suite.yaml").read_text() == "mine"


def test_what_is_no_data(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_of("some/name") == {"source": "hf:some/name", "split": "train"}
    assert source_of("sklearn:digits") == {"source": "sklearn:digits"}
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "loose" / "a.png")
    for given, message in (("nothing", "is no data"), ("loose", "belong to no class")):
        with pytest.raises(DataError, match=message):
            source_of(given)


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize(
    "row",
    [{"question": "How many?", "answer": "two"}, {"text": "A document of some words."}],
)
def test_what_is_written_is_an_experiment(tmp_path, row, accelerator) -> None:
    looked = look_at(str(lines(tmp_path / "rows.jsonl", row)))
    with pytest.raises(CordaError, match="should not forget: --knowledge"):
        starter(
            "own", looked, None, model=None, machine=Machine(False), quick=False, folder=tmp_path
        )
    experiment, suite = starter(
        "own",
        looked,
        looked,
        model=None,
        machine=Machine(accelerator),
        quick=False,
        folder=tmp_path,
    )
    read = load_experiment(write_starter(tmp_path, experiment, suite, "corda-vlm new", False))
    assert read.task.data["format"] == looked.spec["format"]  # pyright: ignore[reportArgumentType]
    assert read.seeds == ([0, 1] if accelerator else [0])
    measured = load_suite(tmp_path / "suite.yaml")
    assert {task.role for task in measured.tasks} == {"gain", "selection", "retention"}
    for task in measured.tasks:
        assert task.data["split"] != "train"  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")
def test_a_quick_one_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "colors")
    photos(tmp_path / "old")
    new = [
        "new",
        "colors",
        "--model",
        "emoji-clip",
        "--knowledge",
        "old",
        "--output",
        "own",
        "--quick",
    ]
    main(new)
    assert "48 records to learn from, pictures of classes, 3 classes" in capsys.readouterr().out
    text = (tmp_path / "own" / "experiment.yaml").read_text()
    assert (
        "# Written by: corda-vlm new colors --model emoji-clip --knowledge old --output own --quick"
        in text
    )
    assert yaml.safe_load(text)["training"]["steps"] == 8
    main(["run", "own/experiment.yaml", "--only", "corda-natural"])
    rows = read_rows("runs/colors/scores.jsonl")
    assert {row["method"] for row in rows} == {"base", "corda-natural"}
    assert {row["task"] for row in rows} == {"colors", "colors-val", "knowledge"}
    with pytest.raises(SystemExit):
        main(new)
    assert "is there already" in capsys.readouterr().err
