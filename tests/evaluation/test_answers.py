"""Asking about one picture, on the models that ship."""

from __future__ import annotations

import io

import pytest
from PIL import Image, ImageDraw

from corda_vlm import ask, classify, load_model
from corda_vlm.__main__ import main
from corda_vlm.data import load_records
from corda_vlm.errors import CordaError

QUESTIONS = {
    "source": "parquet:model_zoo/shapes-llava/data/*.parquet",
    "split": "test",
    "format": "qa",
    "limit": 12,
}
DRAWINGS = {"source": "parquet:model_zoo/emoji-clip/data/*.parquet", "split": "train", "limit": 40}


@pytest.fixture(scope="module")
def llava():
    return load_model("shapes-llava", device="cpu")


@pytest.fixture(scope="module")
def clip():
    return load_model("emoji-clip", device="cpu")


@pytest.fixture
def drawing(tmp_path):
    """A drawing that emoji-clip knows, its name, and names beside it."""
    records = load_records(DRAWINGS)
    names = records.class_names
    path = tmp_path / "drawing.png"
    records[0]["image"].save(path)
    others = list(dict.fromkeys(names[label] for label in records.labels[1:]))
    own = names[records.labels[0]]
    return path, own, [name for name in others if name != own][:8]


def test_a_model_answers_as_it_is_measured_to(llava) -> None:
    said = []
    for record in load_records(QUESTIONS):
        answer = ask(llava, record["question"], record["image"])
        said.append(answer == record["answers"][0])
    assert sum(said) >= 11, "easy-VQA's questions, of which it knows 99 %"


def test_it_sees_what_is_drawn_and_takes_a_picture_in_any_form(llava, tmp_path) -> None:
    picture = Image.new("RGB", (64, 64), (230, 230, 230))
    ImageDraw.Draw(picture).rectangle((16, 16, 44, 44), fill=(0, 0, 255))
    held = io.BytesIO()
    picture.save(held, "PNG")
    path = tmp_path / "own.png"
    picture.save(path)
    for image in (picture, path, str(path), held.getvalue()):
        assert ask(llava, "what color is the shape?", image) == "blue"
    assert ask(llava, "what color is the shape?", picture, max_new_tokens=1)


def test_classes_of_a_picture(clip, drawing) -> None:
    path, own, others = drawing
    ranked = classify(clip, path, [*others, own], ["an emoji of {}."])
    assert ranked[0][0] == own
    assert sum(chance for _, chance in ranked) == pytest.approx(1, abs=1e-5)
    assert [chance for _, chance in ranked] == sorted((c for _, c in ranked), reverse=True)
    alone = classify(clip.model, path, [own], processor=clip.processor)
    assert alone == [(own, pytest.approx(1.0))]


def test_what_cannot_be_asked(llava, clip, drawing, tmp_path) -> None:
    path, own, _ = drawing
    with pytest.raises(CordaError, match="the question is empty"):
        ask(llava, " ")
    with pytest.raises(CordaError, match="generate"):
        ask(clip, "what is this?", path)
    with pytest.raises(CordaError, match=r"compare|embed"):
        classify(llava, path, ["a", "b"])
    for classes in ([], [own, own]):
        with pytest.raises(CordaError, match="each once"):
            classify(clip, path, classes)
    with pytest.raises(CordaError, match="needs the processor"):
        ask(llava.model, "what is this?")
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(CordaError, match=r"no\.png"):
        ask(llava, "what is this?", tmp_path / "no.png")


def test_the_verb(drawing, capsys, tmp_path) -> None:
    path, own, others = drawing
    main(["ask", "emoji-clip", "--classes", ",".join([own, *others]), "--image", str(path), "--templates", "an emoji of {}."])  # fmt: skip
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 5
    assert lines[0].endswith(own)
    main(["ask", "shapes-llava", "what color is the shape?", "--image", str(path), "--max-new-tokens", "1"])  # fmt: skip
    assert capsys.readouterr().out.strip()
    for words, message in (
        (["ask", "emoji-clip"], "either a question"),
        (["ask", "emoji-clip", "what?", "--classes", "a,b"], "either a question"),
        (["ask", "emoji-clip", "--classes", "a,b"], "--image"),
        (["ask", "emoji-clip", "--classes", "a,b", "--image", str(tmp_path / "none.png")], "none.png"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err
