"""CLIP_benchmark: one JSON for each model and data set, with metrics and nothing of single samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from corda_vlm.errors import ForeignFileError
from corda_vlm.files import shown
from corda_vlm.report.formats.base import Format, Measure, Measured, number_of, read_object

NAME = "CLIP_benchmark"
_KEYS = ("dataset", "model", "pretrained", "task", "metrics")
_MOST_BYTES = 20_000_000

CLASSES = {
    "imagenet1k": 1000, "imagenetv2": 1000, "imagenet_sketch": 1000, "imagenet-a": 200, "imagenet-r": 200,
    "imagenet-o": 200, "objectnet": 113, "cifar10": 10, "cifar100": 100, "mnist": 10, "flowers": 102, "cars": 196,
    "svhn": 10, "fer2013": 7, "renderedsst2": 2, "pets": 37, "caltech101": 102, "voc2007": 20, "sun397": 397,
    "fgvc_aircraft": 100, "country211": 211, "dtd": 47, "gtsrb": 43, "stl10": 10, "diabetic_retinopathy": 5, "eurosat": 10,
    "resisc45": 45, "pcam": 2, "clevr_count_all": 8, "clevr_closest_object_distance": 6, "dsprites_label_orientation": 40,
    "dsprites_label_x_position": 32, "dsprites_label_y_position": 32, "smallnorb_label_elevation": 9,
    "smallnorb_label_azimuth": 18, "dmlab": 6, "kitti_closest_vehicle_distance": 4, "food101": 101,
}  # fmt: skip
"""How many classes its data sets have: its files tell them with `--dump_classnames` alone."""


def find(files: list[Path]) -> list[Path]:
    """Its files among some files; they may have any name."""
    return [one for one in files if one.suffix == ".json" and _is_one(one)]


def _is_one(path: Path) -> bool:
    try:
        if path.stat().st_size > _MOST_BYTES:
            return False
        with path.open("rb") as file:
            if not file.read(40).lstrip().startswith(b'{"dataset"'):
                return False
    except OSError:
        return False
    return True


def read(files: list[Path]) -> list[Measured]:
    """The models of some files, each with the data sets on which it was measured."""
    by_model: dict[str, list[Measure]] = {}
    for one in files:
        content = read_object(one, "CLIP_benchmark results")
        if any(key not in content for key in _KEYS) or not isinstance(content["metrics"], dict):
            raise ForeignFileError(
                f"{shown(one)} is no result of CLIP_benchmark: it needs {', '.join(_KEYS)}"
            )
        measures = by_model.setdefault(_name(content), [])
        measures[:] = [m for m in measures if m.task != _task(content)] + _measures(content, one)
    return [Measured(name, (NAME,), tuple(of)) for name, of in by_model.items()]


def _name(content: dict[str, Any]) -> str:
    """Of a checkpoint on a disk its file or folder, else "model, pretrained"."""
    pretrained, model = str(content["pretrained"]), str(content["model"])
    if "/" in pretrained:
        place = Path(pretrained)
        if place.parent.name == "checkpoints":  # as open_clip_train writes them
            return f"{place.parent.parent.name}, {place.stem}"
        return place.parent.name if place.stem.startswith("open_clip") else place.stem
    if model.startswith("local-dir:"):
        return Path(model.removeprefix("local-dir:")).name
    return f"{model}, {pretrained}" if pretrained else model


def _task(content: dict[str, Any]) -> str:
    """The data set, with the kind of task where it is not classification, and the language where it is not English."""
    words = [str(content["dataset"])]
    if content["task"] != "zeroshot_classification":
        words.append(str(content["task"]))
    if content.get("language", "en") != "en":
        words.append(str(content["language"]))
    return " ".join(words)


def _measures(content: dict[str, Any], file: Path) -> list[Measure]:
    classes = _classes(content)
    return [
        Measure(
            task=_task(content),
            metric=metric,
            value=value,
            file=file,
            chance=_chance(metric, str(content["task"]), classes),
            is_share=0 <= value <= 1,
            settings={"templates": json.dumps(content["templates"])}
            if "templates" in content
            else {},
        )
        for metric, told in content["metrics"].items()
        if (value := number_of(told)) is not None
    ]


def _classes(content: dict[str, Any]) -> int | None:
    if isinstance(names := content.get("classnames"), list) and names:
        return len(names)
    name = str(content["dataset"]).removeprefix("wds/").removeprefix("vtab/")
    return CLASSES.get(name.rpartition("/")[2])


def _chance(metric: str, task: str, classes: int | None) -> float | None:
    if task == "zeroshot_retrieval":
        return 0.0
    if classes is None or task not in ("zeroshot_classification", "linear_probe"):
        return None
    if metric in ("acc1", "mean_per_class_recall"):
        return 1 / classes
    return min(1.0, 5 / classes) if metric == "acc5" else None


FORMAT = Format(NAME, "the JSON files that clip_benchmark eval --output names", find, read)
