"""The built-in LLaVA: its card tells the truth, and plain transformers loads it and gets answers."""

from __future__ import annotations

import collections
import importlib
import io
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from corda_vlm import evaluate, load_model

pq = pytest.importorskip("pyarrow.parquet")
transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parents[2] / "model_zoo" / "shapes-llava"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return pq.read_table(FOLDER / "data" / "easy_vqa.parquet").to_pylist()


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(FOLDER)
    return model.eval(), transformers.AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a script of the folder; other folders of the zoo have scripts of the same names."""
    names = ("shapes", "train", "evaluate", "make_data")
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)


def opened(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")).astype(int)


def known(row: dict[str, Any]) -> tuple[str, str] | None:
    """Shape and colour of an official image, where its questions tell both."""
    answers = {pair["answer"] for pair in json.loads(row["qa_json"])} - {"yes", "no"}
    shapes = answers & {"circle", "rectangle", "triangle"}
    colours = answers - shapes
    return (shapes.pop(), colours.pop()) if shapes and colours else None


# ------------------------------------------------------------------ the card and the files


def test_the_card_has_the_measured_numbers(card: dict[str, Any], metrics: dict[str, Any]) -> None:
    assert card["metrics"]["test"] == metrics["test"]
    assert card["metrics"]["blind"] == metrics["blind"]
    training = metrics["training"]
    for name in ("questions", "wall_minutes", "command"):
        assert card["training"][name] == training[name]
    assert card["training"]["steps"] == training["options"]["steps"]
    assert card["training"]["seed"] == training["options"]["seed"]
    for kind in ("all", "open", "yes_no"):
        assert card["training"]["val"][kind] == round(training[f"val_{kind}"], 4)


def test_the_targets_are_met(metrics: dict[str, Any]) -> None:
    test, blind = metrics["test"], metrics["blind"]
    assert test["all"]["n"] == 9673
    assert test["all"]["accuracy"] >= 0.95
    assert blind["all"] == pytest.approx(0.67, abs=0.005)
    assert test["open"]["accuracy"] >= 0.90
    assert blind["open"] == pytest.approx(0.23, abs=0.005)
    assert blind["yes_no"] == pytest.approx(0.825, abs=0.005)


def test_the_card_describes_the_model(
    card: dict[str, Any], loaded: tuple[Any, Any], rows: list[dict[str, Any]]
) -> None:
    model, processor = loaded
    assert sum(p.numel() for p in model.parameters()) == card["architecture"]["parameters"]
    config = model.config
    assert config.vision_config.patch_size == card["architecture"]["patch_size"]
    assert config.image_seq_length == card["architecture"]["image_tokens"]
    assert config.text_config.max_position_embeddings == card["architecture"]["context"]
    assert len(processor.tokenizer) == card["architecture"]["vocabulary"]
    for split, said in card["data"]["splits"].items():
        own = [row for row in rows if row["split"] == split]
        questions = sum(len(json.loads(row["qa_json"])) for row in own)
        assert (len(own), questions) == (said["images"], said["questions"]), split
    for path in (card["files"]["weights"], card["files"]["licence"], *card["files"]["recipe"]):
        assert (FOLDER / path).is_file(), path


def test_files_stay_small() -> None:
    sizes = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 40 * MEGABYTE
    assert sizes[FOLDER / "data" / "easy_vqa.parquet"] <= 3 * MEGABYTE


def test_weights_are_finite_halves(loaded: tuple[Any, Any]) -> None:
    assert {p.dtype for p in loaded[0].parameters()} == {torch.float16}
    assert all(bool(torch.isfinite(p).all()) for p in loaded[0].parameters())


def test_the_split_follows_from_the_image(
    recipe: Callable[[str], Any], rows: list[dict[str, Any]]
) -> None:
    split_of = recipe("make_data").split_of
    official = [row for row in rows if row["split"] != "test"]
    assert all(split_of(row["image"]) == row["split"] for row in official)
    assert len({row["image"] for row in rows}) == len(rows)  # none in two splits


# ------------------------------------------------------------------ what it says


@torch.no_grad()
def test_plain_transformers_gets_answers(
    loaded: tuple[Any, Any], rows: list[dict[str, Any]]
) -> None:
    """Twenty test images, each with a question about it and one about what is not there."""
    model, processor = loaded
    test = [row for row in rows if row["split"] == "test"][:20]
    asked, pictures, wanted = [], [], []
    for row in test:
        for pair in json.loads(row["qa_json"])[:: len(json.loads(row["qa_json"])) - 1]:
            asked.append(pair["question"])
            wanted.append(pair["answer"])
            pictures.append(Image.open(io.BytesIO(row["image"])))
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in asked
    ]
    batch = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    said = model.generate(**batch.to(dtype=model.dtype), max_new_tokens=4, do_sample=False)
    answers = processor.batch_decode(
        said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = [answer.strip() == one for answer, one in zip(answers, wanted, strict=True)]
    assert sum(right) >= 0.9 * len(right), list(zip(asked, answers, wanted, strict=True))


def test_a_sample_scores_as_the_card_says(
    recipe: Callable[[str], Any], metrics: dict[str, Any]
) -> None:
    """400 test questions by the name of the model, through the package's own evaluation."""
    own = recipe("evaluate")
    suite = own.suite(own.DATA, "test")
    scores = evaluate(load_model("shapes-llava"), suite, limit=400, batch_size=128)
    for score in scores:
        expected = metrics["test"][own.METRICS[score.metric]]["accuracy"]
        # Four standard errors, and one question.
        spread = 4 * math.sqrt(expected * (1 - expected) / score.n) + 1 / score.n
        assert abs(score.value - expected) <= spread, score
    assert {own.METRICS[score.metric] for score in scores} == {"all", "yes_no", "open"}


def test_any_text_can_be_written(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1].tokenizer
    for text in ("Which digit is this?", "seven", "Ça fait 3,50 €; 七 🙂", "USER:\tx\n"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    for word in (" yes", " no", " rectangle", " yellow", " seven"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


# ------------------------------------------------------------------ the recipe


def test_questions_are_the_official_ones(
    recipe: Callable[[str], Any], rows: list[dict[str, Any]]
) -> None:
    """The same 107, and the same answers wherever shape and colour are known."""
    shapes, train = recipe("shapes"), recipe("train")

    asked = {pair["question"] for row in rows for pair in json.loads(row["qa_json"])}
    assert asked == {question for question, _ in train.every_pair()}
    assert len(asked) == 107
    for row in rows[:300]:
        if (scene := known(row)) is not None:
            answers = dict(shapes.open_questions(*scene))
            for negated in (False, True):
                answers |= dict(shapes.yes_no_questions(*scene, negated))
            for pair in json.loads(row["qa_json"]):
                assert answers[pair["question"]] == pair["answer"]


def test_an_official_image_can_be_painted_again(
    recipe: Callable[[str], Any], rows: list[dict[str, Any]]
) -> None:
    """Some scene gives it: rectangles and triangles to the bit, circles but for pixels of the rim."""
    shapes = recipe("shapes")

    def painted(*scene: Any) -> np.ndarray:
        return shapes.paint(shapes.Scene(*scene))

    found: collections.Counter[str] = collections.Counter()
    for row in rows:
        if (scene := known(row)) is None or found[scene[0]] == 2:
            continue
        shape, colour = scene
        pixels = opened(row)
        background = tuple(
            collections.Counter(map(tuple, pixels.reshape(-1, 3))).most_common(1)[0][0]
        )
        ys, xs = np.nonzero((pixels != background).any(-1))
        if min(background) < 230 or min(xs[0], ys[0]) < 2 or max(xs.max(), ys.max()) > 61:
            continue
        wide, high = 2 * np.ptp(xs) + 2, 2 * np.ptp(ys) + 2
        lefts = range(2 * xs.min() - 1, 2 * xs.min() + 3)
        tops = range(2 * ys.min() - 1, 2 * ys.min() + 3)
        if shape == "triangle":
            tops = range(2 * ys.max() - 2, 2 * ys.max() + 3)
        heights = range(high - 5, high) if shape == "rectangle" else [0]
        if wide > 40 or high > 40:
            continue
        best = min(
            float(np.abs(painted(shape, colour, background, (x, y), (w, h)) - pixels).mean())
            for x, y, w, h in itertools.product(lefts, tops, range(wide - 5, wide), heights)
        )
        assert best <= (0.1 if shape == "circle" else 0), (row["image_id"], shape, best)
        found[shape] += 1
    assert found == {"circle": 2, "rectangle": 2, "triangle": 2}


def test_drawn_images_are_spread_as_the_official_ones(
    recipe: Callable[[str], Any], rows: list[dict[str, Any]]
) -> None:
    shapes = recipe("shapes")
    draw = random.Random(0)
    scenes = [shapes.draw_scene(draw) for _ in range(800)]
    official = [pair for row in rows[:800] if (pair := known(row)) is not None]
    drawn = [(scene.shape, scene.colour) for scene in scenes]
    for place, names in ((0, shapes.SHAPES), (1, shapes.COLOURS)):
        for name in names:
            shares = [sum(p[place] == name for p in some) / len(some) for some in (drawn, official)]
            assert shares[0] == pytest.approx(shares[1], abs=0.08), name

    def measures(images: list[np.ndarray]) -> np.ndarray:
        """Of each image: the shape's box, its area, and the background's brightness."""
        found = []
        for image in images:
            pale = image.min(-1) >= 230
            ys, xs = np.nonzero(~pale)
            box = (xs.min(), xs.max(), ys.min(), ys.max(), np.ptp(xs), np.ptp(ys))
            found.append((*box, (~pale).sum() ** 0.5, image[pale].mean()))
        return np.asarray(found, dtype=float)

    ours = measures([shapes.paint(scene).astype(int) for scene in scenes])
    theirs = measures([opened(row) for row in rows[:800]])
    spread = theirs.std(0)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max(initial=0, where=spread > 0) < 2.0
    np.testing.assert_allclose(ours.std(0), spread, rtol=0.12)
    np.testing.assert_allclose(ours.max(0), theirs.max(0), atol=2)


@torch.no_grad()
def test_packed_questions_have_the_plain_models_logits(
    recipe: Callable[[str], Any], loaded: tuple[Any, Any], rows: list[dict[str, Any]]
) -> None:
    """Several questions in one sequence are what each is by itself."""
    train, processor = recipe("train"), loaded[1]
    model: Any = load_model("shapes-llava").model
    packing = train.Packing(processor.tokenizer, model.config.image_seq_length)
    row = rows[0]
    pairs = [(pair["question"], pair["answer"]) for pair in json.loads(row["qa_json"])[:3]]
    pixels = train.normalise(train.to_tensor(opened(row).astype(np.uint8)))[None]
    ids, learnt = packing.segments([pairs])
    packed, wanted = train.answer_logits(model, packing, pixels, ids, learnt, packing.frame(3))
    plain = []
    for question, answer in pairs:
        text = f"USER: <image>\n{question} ASSISTANT: {answer}</s>"
        image = Image.open(io.BytesIO(row["image"]))
        batch = processor(images=image, text=text, return_tensors="pt")
        assert torch.allclose(batch["pixel_values"], pixels, atol=1e-5)
        logits = model(**batch).logits[0]
        plain.append(logits[-3:-1])  # before the answer's one token, and before the end
        assert batch["input_ids"][0, -2:].tolist() == wanted[len(plain) * 2 - 2 :][:2].tolist()
    # One runs under bfloat16 autocast, the other does not.
    assert (packed - torch.cat(plain)).abs().max() < 0.03 * torch.cat(plain).abs().max()
