"""The shipped suites parse, their class names are complete and in the data's order, and the real model runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from corda_vlm.errors import DataError
from corda_vlm.evaluation import evaluate, load_suite
from corda_vlm.evaluation.class_names import load_class_names, load_templates, match_class_names
from corda_vlm.families import detect_family
from corda_vlm.families.base import Loaded, Processor
from corda_vlm.files import asset

SUITES = sorted(path.stem for path in asset("eval/suites").glob("*.yaml"))
COUNTS = {
    "caltech101": 101, "cifar10": 10, "cifar100": 100, "dtd": 47, "eurosat": 10, "flowers102": 102, "food101": 101,
    "oxford-pets": 37, "stanford-cars": 196, "sun397": 397,
}  # fmt: skip


@pytest.mark.parametrize("name", SUITES)
def test_a_shipped_suite_is_whole(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite.about
    for task in suite.tasks:
        if task.kind != "zero_shot":
            continue
        assert load_templates(task.templates, task.source)  # type: ignore[arg-type]
        classes = task.classes
        if isinstance(classes, dict) and "names" in classes:
            names = load_class_names(classes["names"], task.source)
            assert (
                len(match_class_names(names, None, count=classes["count"]).names)
                == classes["count"]
            )


def test_both_suites_are_shipped() -> None:
    assert {"emoji-digits", "zero-shot"} <= set(SUITES)
    roles = {task.role for task in load_suite("emoji-digits").tasks}
    assert roles == {"gain", "retention", "selection"}
    assert len(load_suite("zero-shot").tasks) == 11


def test_every_list_of_class_names_is_whole() -> None:
    found = {path.stem for path in asset("eval/class_names").glob("*.yaml")}
    assert found == set(COUNTS)
    for name, count in COUNTS.items():
        names = load_class_names(name)
        assert isinstance(names, dict)
        assert len(names) == count
        assert len(set(names.values())) == count, f"{name}: two classes have one prompt"
        for said in names.values():
            assert said == said.strip()
            assert said
            assert "_" not in said


def test_yaml_did_not_turn_a_name_into_something_else() -> None:
    for path in asset("eval/class_names").glob("*.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert all(isinstance(word, str) for pair in content.items() for word in pair), path


def test_names_match_torchvisions_own() -> None:
    """Where torchvision carries the names in its source; the others are checked when their data is loaded."""
    from torchvision.datasets import EuroSAT, Flowers102

    names = load_class_names("flowers102")
    labels = match_class_names(names, Flowers102.classes, count=102)
    assert labels.remap is None
    assert labels.names[59] == "pink and yellow dahlia"
    assert EuroSAT.__mro__[1].__name__ == "ImageFolder", "so its classes are its folders, sorted"
    assert list(load_class_names("eurosat")) == sorted(load_class_names("eurosat"))
    # torchvision's Pets writes 'American Bulldog', SUN397 'apse/indoor'.
    pets = load_class_names("oxford-pets")
    assert match_class_names(pets, ["American Bulldog", "British Shorthair"]).remap == (1, 9)
    assert (
        match_class_names(load_class_names("sun397"), ["abbey", "apse/indoor", "jail_cell"]).remap[
            0
        ]
        == 0
    )  # type: ignore[index]


def test_food101_is_in_torchvisions_order() -> None:
    # CLIP's own list has it so too; that of the data set's authors has cheesecake first.
    names = list(load_class_names("food101"))
    assert names == sorted(names)
    assert names.index("cheese_plate") < names.index("cheesecake")


def test_caltech101_on_real_photographs(shared_data: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(
        shared_data / "caltech101_test_10perclass_224.parquet", columns=["class_name", "label"]
    )
    own = dict(zip(table["class_name"].to_pylist(), table["label"].to_pylist(), strict=True))
    labels = match_class_names(load_class_names("caltech101"), sorted(own), count=101)
    said = dict(
        zip(sorted(own), [labels.names[i] for i in labels.remap or range(101)], strict=True)
    )
    assert said["cougar body"] == "body of a cougar cat"
    assert said["Faces easy"] == "centered face"
    assert [own[name] for name in sorted(own)] == list(range(101)), (
        "our list is in the data's label order"
    )


def _save(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (len(name) * 9 % 256, 90, 160)).save(folder / name)


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """A few pictures in the very layouts that torchvision reads, of the sets that it takes without a checksum."""
    for name in load_class_names("eurosat"):
        _save(tmp_path / "eurosat" / "2750" / name, f"{name}_1.jpg")

    dtd = tmp_path / "dtd" / "dtd"
    (dtd / "labels").mkdir(parents=True)
    (dtd / "labels" / "test1.txt").write_text("woven/woven_1.jpg\npolka-dotted/polka_1.jpg\n")
    _save(dtd / "images" / "woven", "woven_1.jpg")
    _save(dtd / "images" / "polka-dotted", "polka_1.jpg")

    food = tmp_path / "food-101"
    (food / "meta").mkdir(parents=True)
    chosen = {name: [f"{name}/1"] for name in ("cheesecake", "cheese_plate", "apple_pie")}
    (food / "meta" / "test.json").write_text(json.dumps(chosen))
    for name in chosen:
        _save(food / "images" / name, "1.jpg")

    pets = tmp_path / "oxford-iiit-pet"
    (pets / "annotations").mkdir(parents=True)
    (pets / "annotations" / "test.txt").write_text("Abyssinian_1 1 1 1\namerican_bulldog_2 2 2 1\n")
    _save(pets / "images", "Abyssinian_1.jpg")
    _save(pets / "images", "american_bulldog_2.jpg")

    for name in ("Faces", "Faces_easy", "BACKGROUND_Google", "yin_yang"):
        _save(tmp_path / "caltech101" / "101_ObjectCategories" / name, "image_0001.jpg")
    (tmp_path / "caltech101" / "Annotations").mkdir()

    sun = tmp_path / "SUN397"
    for scene in ("a/abbey", "a/apse/indoor", "j/jail_cell"):
        _save(sun / scene, "sun_a.jpg")
    (sun / "ClassName.txt").write_text("/a/abbey\n/a/apse/indoor\n/j/jail_cell\n")
    return tmp_path


def test_the_zero_shot_suite_on_local_folders(data_root: Path, tiny_open_clip, caplog) -> None:
    """What is not there is left out, and said so; what is there is matched by torchvision's own class names."""
    processor = Processor(
        image=lambda picture: torch.full((3, 32, 32), float(picture.getpixel((0, 0))[0]) / 255),
        text=lambda texts: {
            "input_ids": torch.tensor([[1 + len(t) % 90, 99] + [0] * 10 for t in texts])
        },
        image_size=(32, 32),
    )
    model = Loaded(tiny_open_clip, processor, detect_family(tiny_open_clip), "tiny")
    scores = evaluate(model, "zero-shot", data_root=data_root, missing="skip")
    found = {score.task: score for score in scores}
    assert {task: score.n for task, score in found.items()} == {
        "eurosat": 10, "dtd": 2, "food101": 3, "oxford-pets": 2, "caltech101": 3, "sun397": 3,
    }  # fmt: skip
    for absent in ("imagenet", "cifar10", "cifar100", "flowers102", "stanford-cars"):
        assert f"task {absent} is left out" in caplog.text
    assert next(s for s in scores if s.task == "sun397").chance == pytest.approx(1 / 397)
    with pytest.raises(DataError, match="task imagenet"):
        evaluate(model, "zero-shot", data_root=data_root)


def test_an_imagenet_that_is_not_whole_is_refused(data_root: Path, tiny_open_clip) -> None:
    """Its names go by order alone, so a folder short of classes would be scored against the wrong ones."""
    for synset in ("n01440764", "n01443537"):
        _save(data_root / "imagenet" / "val" / synset, "ILSVRC2012_val_1.JPEG")
    processor = Processor(lambda picture: torch.zeros(3, 32, 32), lambda texts: {}, (32, 32))
    model = Loaded(tiny_open_clip, processor, detect_family(tiny_open_clip), "tiny")
    with pytest.raises(
        DataError, match=r"task imagenet .*the data has 2 classes .* but 1000 names"
    ):
        evaluate(model, "zero-shot", tasks=["imagenet"], data_root=data_root)


def test_the_zoos_model_on_its_suite() -> None:
    """The real CLIP, on a part: what the card says within the interval, far above chance."""
    folder = asset("model_zoo/emoji-clip")
    if not (folder / "open_clip_model.safetensors").exists():
        pytest.skip(
            "the weights of emoji-clip are not here; model_zoo/emoji-clip/README.md makes them"
        )
    from corda_vlm.families import load_model

    scores = evaluate(
        load_model("emoji-clip"),
        "emoji-digits",
        tasks=["openmoji"],
        limit=300,
        batch_size=256,
        bf16=True,
    )
    by_metric = {score.metric: score for score in scores}
    assert by_metric["top5"].n == 300
    assert by_metric["top5"].chance == pytest.approx(5 / 1644)
    assert by_metric["top5"].low > 10 * by_metric["top5"].chance
    assert by_metric["top1"].value < by_metric["top5"].value
    card = yaml.safe_load((folder / "card.yaml").read_text(encoding="utf-8"))
    assert by_metric["top5"].value == pytest.approx(card["metrics"]["openmoji"]["top5"], abs=0.08)
