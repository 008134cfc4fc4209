"""Class names and templates: matched by name, checked by count, and never silently in the wrong order."""

from __future__ import annotations

from pathlib import Path

import pytest

from corda_vlm.errors import CordaError, DataError, UnknownNameError
from corda_vlm.evaluation.class_names import load_class_names, load_templates, match_class_names


def test_templates_from_everywhere(tmp_path: Path) -> None:
    assert load_templates(["a {}", "the {}!"]) == ("a {}", "the {}!")
    assert len(load_templates("openai_imagenet")) == 80
    assert "a bad photo of a {}." in load_templates("openai_imagenet")
    assert len(load_templates("simple_imagenet")) == 7
    assert load_templates("eurosat")[0] == "a centered satellite photo of {}."
    (tmp_path / "mine.txt").write_text("# two\na {}\n\n{} again\n")
    assert load_templates("mine.txt", beside=tmp_path / "suite.yaml") == ("a {}", "{} again")


def test_templates_that_cannot_be_filled() -> None:
    for bad in ("a photo", "{} and {}", "{name}", "a {:>3}"):
        with pytest.raises(CordaError, match=r"one \{\} where"):
            load_templates([bad])
    with pytest.raises(CordaError, match="no templates"):
        load_templates([])
    with pytest.raises(UnknownNameError, match="openai_imagenet"):
        load_templates("imagnet")


def test_class_names_from_everywhere(tmp_path: Path) -> None:
    assert len(load_class_names("openai_imagenet")) == 1000
    names = load_class_names("eurosat")
    assert isinstance(names, dict)
    assert names["SeaLake"] == "lake or sea"
    (tmp_path / "list.yaml").write_text("[cat, dog]")
    assert load_class_names(str(tmp_path / "list.yaml")) == ("cat", "dog")
    (tmp_path / "bad.yaml").write_text("just words")
    with pytest.raises(CordaError, match="list of class names"):
        load_class_names(str(tmp_path / "bad.yaml"))
    with pytest.raises(UnknownNameError, match="Did you mean 'food101'"):
        load_class_names("food-101")


def test_a_mapping_is_matched_by_name_in_the_datas_order() -> None:
    wanted = {"apple_pie": "apple pie", "hot_dog": "hot dog", "pho": "pho"}
    labels = match_class_names(wanted, ["pho", "apple_pie"])
    assert labels.names == ("apple pie", "hot dog", "pho")
    assert labels.remap == (2, 0)
    assert match_class_names(wanted, list(wanted)).remap is None


def test_case_and_punctuation_do_not_matter_unless_they_tell_classes_apart() -> None:
    wanted = {
        "apse_indoor": "apse indoor",
        "C++": "the language",
        "C": "the letter",
        "*": "asterisk",
        "#": "hash",
    }
    labels = match_class_names(wanted, ["Apse/indoor", "C", "C++", "#", "*"])
    assert labels.remap == (0, 2, 1, 4, 3)
    with pytest.raises(DataError, match=r"'c'.*"):
        match_class_names(wanted, ["c"])  # could be either


def test_a_list_is_matched_by_name_where_the_names_are_the_datas_own() -> None:
    assert match_class_names(["cat", "dog"], ["dog", "cat"]).remap == (1, 0)
    # Of other names only the order is known, and the number is checked.
    assert match_class_names(["cat", "dog"], ["n01", "n02"]).remap is None
    with pytest.raises(DataError, match=r"3 classes .* but 2 names"):
        match_class_names(["cat", "dog"], ["n01", "n02", "n03"])


def test_imagenets_order_is_kept_whatever_the_data_calls_its_classes() -> None:
    wanted = ["crane bird", "construction crane"]
    assert (
        match_class_names(wanted, ["construction crane", "crane bird"], in_order=True).remap is None
    )
    with pytest.raises(DataError, match="but 2 names"):
        match_class_names(wanted, ["n01"], in_order=True)


def test_missing_names_and_wrong_counts_are_named() -> None:
    with pytest.raises(
        DataError, match=r"my task: 1 of the data's 2 classes have no name .* 'BACKGROUND_Google'"
    ):
        match_class_names({"cat": "a cat"}, ["cat", "BACKGROUND_Google"], what="my task")
    with pytest.raises(DataError, match="2 class names, but the suite says 3"):
        match_class_names(["cat", "dog"], None, count=3)
    assert match_class_names(["cat", "dog"], None).names == ("cat", "dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[red, no]", "False is no class name"),
        (b"- red\n-\n", "None is no class name"),
        (b"- 2020-01-01\n", "is no class name"),
        (b"red: [1]\n", "is no class name"),
        (b"- \xff\n", "not UTF-8"),
        (b"- a\0b\n", "not YAML"),
        (b"[" * 5000, "not YAML"),
        (b"3", "must hold a list"),
    ],
)
def test_what_is_no_file_of_class_names(tmp_path, content, message):
    """YAML makes a truth value of the Norwegians' no: as a class it would be called False."""
    (tmp_path / "names.yaml").write_bytes(content)
    with pytest.raises(CordaError, match=rf"names\.yaml.*{message}"):
        load_class_names(str(tmp_path / "names.yaml"))


@pytest.mark.parametrize("template", ["a {} {}", "a {", "a {} }", "a {x} {}", "a {}\0"])
def test_what_is_no_template(template):
    with pytest.raises(CordaError, match="template"):
        load_templates([template])
