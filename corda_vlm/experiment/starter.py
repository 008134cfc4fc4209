"""A first experiment and its suite for data that somebody has: what the data is, and what a reasonable beginning looks like."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from corda_vlm.data import load_records
from corda_vlm.data.load import read_table
from corda_vlm.data.sources.images import IMAGE_SUFFIXES
from corda_vlm.data.sources.libraries import hf_splits
from corda_vlm.data.spec import names_source, parse_spec
from corda_vlm.data.text.registry import FORMATS
from corda_vlm.errors import CordaError, DataError
from corda_vlm.evaluation import load_suite
from corda_vlm.evaluation.class_names import DEFAULT_TEMPLATES
from corda_vlm.experiment.load import load_experiment
from corda_vlm.files import check_path, shown, write_text

CLASSES, CAPTIONS, TALK, CHOICES, LONG, TEXT = (
    "pictures of classes", "pictures with captions", "questions with short answers", "multiple choice", "conversations",
    "documents",
)  # fmt: skip
"""What data may be, in words for people."""

MODELS = {
    CLASSES: "openai/clip-vit-base-patch32",
    CAPTIONS: "openai/clip-vit-base-patch32",
    TEXT: "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""The model that learns by default; of conversations one that sees pictures where there are some."""

SEES, READS = "llava-hf/llava-1.5-7b-hf", MODELS[TEXT]

OWN_KNOWLEDGE = {
    "emoji-clip": {"source": "parquet:model_zoo/emoji-clip/data/*.parquet", "split": "train"}
}
"""What a built-in model knows, which its shipped suite measures on other records."""

OWN_SUITE = {"emoji-clip": "emoji"}

RATES = {
    # of the demo (eval/measured/demo), for models as small as the built-in ones
    "small": {"corda-natural": [5e-4, 1e-3], "natural-distill": [1e-3, 2e-3], "lora": [1e-3, 2e-3, 4e-3]},
    # of configs/clip-vit-b32.yaml and configs/llava.yaml
    "usual": {"corda-natural": [2e-4, 5e-4], "natural-distill": [2e-4, 5e-4], "lora": [2e-4, 5e-4, 1e-3]},
}  # fmt: skip
"""Learning rates by the size of the model."""

_KINDS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "text", ".tar": "webdataset"}  # fmt: skip
_TRAIN, _TEST, _VAL = (
    ("train", "training"),
    ("test", "testing"),
    ("val", "valid", "validation", "dev"),
)
_SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}
_HALVES = {"train": 0.5, "test": 0.5}


@dataclass(frozen=True)
class Looked:
    """What data is.

    Attributes:
        spec: how it is read, without a split.
        is_: one of the words above.
        parts: "train", "val" and "test" -> what is added to `spec` for that part; "val" may not be there.
        classes: names of the classes of pictures, else none.
        count: records to learn from.
        pictures: has it some?
    """

    spec: Mapping[str, Any]
    is_: str
    parts: Mapping[str, Mapping[str, Any]]
    classes: tuple[str, ...]
    count: int
    pictures: bool

    def part(self, name: str) -> dict[str, Any]:
        return {**self.spec, **self.parts[name]}


@dataclass(frozen=True)
class Machine:
    """What trains.

    Attributes:
        accelerator: whether there is one; else it is a CPU.
    """

    accelerator: bool


def source_of(given: str) -> dict[str, Any]:
    """A data spec of what somebody typed: a folder, a file, a spec `kind:where`, or the id of a data set on a hub.

    Raises:
        DataError: nothing of the sort.
    """
    if names_source(given):
        return {"source": given}
    path = check_path(given).expanduser()
    if path.is_dir():
        return {"source": _source_of_folder(path.resolve())}
    if path.is_file() and path.suffix.lower() in _KINDS:
        return {"source": f"{_KINDS[path.suffix.lower()]}:{path.resolve()}"}
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        return {"source": f"hf:{given}", "split": "train"}
    raise DataError(
        f"{shown(given)} is no data that could be looked at: give a folder with one folder of pictures a class, a file that ends in "
        f"{', '.join(_KINDS)}, the id of a data set such as owner/name, or a spec such as sklearn:digits"
    )


def _source_of_folder(folder: Path) -> str:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return f"hf:{folder}"
    for suffix in (".parquet", ".tar"):
        if any(folder.glob(f"*{suffix}")):
            return f"{_KINDS[suffix]}:{folder}/*{suffix}"
    files = [
        file for suffix in (".jsonl", ".json", ".csv", ".tsv") for file in folder.glob(f"*{suffix}")
    ]
    if len(files) == 1 and not any(path.is_dir() for path in folder.iterdir()):
        return f"{_KINDS[files[0].suffix]}:{files[0]}"
    if any(p.suffix.lower() in IMAGE_SUFFIXES for p in folder.iterdir()):
        raise DataError(
            f"{shown(folder)} holds pictures that belong to no class; put each into a folder named as its class"
        )
    return f"folder:{folder}"


def look_at(given: str) -> Looked:
    """What some data is: its format, its parts and its classes.

    Raises:
        DataError: it cannot be read, or nothing in it can be learned; as of `source_of` too.
    """
    source, parts = _own_parts(source_of(given)["source"])
    spec: dict[str, Any] = {"source": source}
    first = {**spec, **(parts["train"] if parts else {})}
    table = read_table(parse_spec(first), None)
    spec = {**spec, **_format_of(table.columns, bool(table.images), spec)}
    parts = parts or _column_parts(table.columns.get("split")) or _cut_parts()
    records = load_records({**spec, **parts["train"]})
    return Looked(
        spec,
        _what(records, table.columns),
        parts,
        tuple(map(str, records.class_names or ())),
        len(records),
        records.has_images,
    )


def _own_parts(source: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """What is read, and the parts that it comes in: folders train/, val/, test/, or the splits of a Hugging Face data set.

    There are none where its folders are classes, or for other kinds of sources. Where there is none to measure on, all are
    cut out of the one to learn from.

    Raises:
        DataError: it has several splits, and it cannot be told which is which.
    """
    kind, _, where = source.partition(":")
    if kind == "folder":
        names = [path.name for path in Path(where).iterdir() if path.is_dir()]
        parts = _named(names) if any(name.lower() in _TRAIN for name in names) else {}
        if parts and "test" not in parts:
            return f"{source}/{parts['train']['split']}", _cut_parts()
        return source, parts
    names = hf_splits(parse_spec(source)) if kind == "hf" else []
    parts = _named(names)
    if not names or {"train", "test"} <= parts.keys():
        return source, parts
    # A part that the data set does not have is cut out of its first split.
    if len(names) > 1 and parts.get("train") != {"split": names[0]}:
        raise DataError(
            f"{source} has the splits {', '.join(names)}, of which none is called train and another test; save the one to "
            "learn from as a file, and give that"
        )
    return source, _cut_parts()


def _cut_parts() -> dict[str, dict[str, Any]]:
    return {name: {"split": name, "splits": dict(_SPLITS)} for name in _SPLITS}


def _column_parts(column: Sequence[Any] | None) -> dict[str, dict[str, Any]]:
    parts = _named(sorted({str(value) for value in column or ()}))
    return parts if {"train", "test"} <= parts.keys() else {}


def _named(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Which of the names are parts; without a test part the validation part is it."""
    found: dict[str, dict[str, Any]] = {}
    for part, words in (("train", _TRAIN), ("val", _VAL), ("test", _TEST)):
        own = next((name for name in names if name.lower() in words), None)
        if own is not None:
            found[part] = {"split": own}
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    return found


def _format_of(columns: Mapping[str, Any], images: bool, spec: Mapping[str, Any]) -> dict[str, Any]:
    """What rows mean to a model that generates text; nothing for pictures with classes or captions."""
    if spec["source"].startswith("text:"):
        return {"format": "text"}
    for name, form in FORMATS.items():
        if form.columns and all(column in columns for column in form.columns):
            return {"format": name}
    if "question" in columns or "qa_json" in columns:
        return {"format": "qa"}
    pictures = images or any(
        name in columns for name in ("image", "image_path", "file_name", "path")
    )
    return {"format": "text"} if "text" in columns and not pictures else {}


def _what(records: Any, columns: Mapping[str, Any]) -> str:
    if records.spec.format == "text":
        return TEXT
    if records.spec.format is None:
        if records.labels is not None and records.has_images:
            return CLASSES
        if records.texts is not None and records.has_images:
            return CAPTIONS
        raise DataError(
            f"{records.spec}: has neither classes nor captions of its pictures to learn"
        )
    if any(name in columns for name in ("choices", "options")):
        return CHOICES
    said = [records.messages(index)[-1]["content"] for index in range(min(50, len(records)))]
    words = sorted(len(str(one).split()) for one in said)
    return TALK if words[len(words) // 2] <= 5 else LONG


def task_of(name: str, role: str, data: Mapping[str, Any], looked: Looked) -> dict[str, Any]:
    """A task of a suite that measures what is in some data."""
    more: dict[str, Any] = {
        CLASSES: {"kind": "zero_shot", "classes": list(looked.classes), "templates": list(DEFAULT_TEMPLATES)},
        CAPTIONS: {"kind": "retrieval", "metrics": ["image_to_text_recall@1", "text_to_image_recall@1"]},
        TALK: {"kind": "qa"},
        CHOICES: {"kind": "multiple_choice"},
        LONG: {"kind": "likelihood", "metrics": ["token_probability"]},
        TEXT: {"kind": "perplexity", "metrics": ["token_probability"]},
    }[looked.is_]  # fmt: skip
    return {"name": name, "role": role, **more, "data": dict(data)}


def starter(
    name: str,
    looked: Looked,
    knowledge: Looked | None,
    *,
    model: str | None,
    machine: Machine,
    quick: bool,
    folder: Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An experiment and its suite, as the mappings that their files hold.

    Args:
        name: of both.
        looked: what is learned.
        knowledge: what is to be kept; None takes what a built-in model knows.
        model: what learns; None takes a usual one for such data.
        machine: what trains.
        quick: limits everywhere, so that all of it runs in a minute or two and shows that it works.
        folder: where the suite's file will lie.

    Raises:
        CordaError: it is not said what is to be kept.
    """
    model = model or MODELS.get(looked.is_) or (SEES if looked.pictures else READS)
    if knowledge is None and model not in OWN_KNOWLEDGE:
        raise CordaError(
            f"say what {model} should not forget: --knowledge with data of the kind that it knows, as for the new task, e.g. "
            "--knowledge folder:imagenet/val. It is kept by, and measured on, different records of it"
        )
    tasks = [task_of(name, "gain", looked.part("test"), looked)]
    if "val" in looked.parts:
        tasks.append(task_of(f"{name}-val", "selection", looked.part("val"), looked))
    suite: dict[str, Any] = {"name": name, "version": 1}
    if knowledge is None:
        suite["extends"], kept = OWN_SUITE[model], OWN_KNOWLEDGE[model]
    else:
        known = "knowledge" if name != "knowledge" else "knowledge-kept"  # two tasks need two names
        tasks.append(task_of(known, "retention", knowledge.part("test"), knowledge))
        kept = knowledge.part("train")
    suite["tasks"] = tasks
    return _experiment(name, looked, kept, model, machine, quick, folder), suite


def _experiment(
    name: str,
    looked: Looked,
    kept: Mapping[str, Any],
    model: str,
    machine: Machine,
    quick: bool,
    folder: Path,
) -> dict[str, Any]:
    pictures = looked.is_ in (CLASSES, CAPTIONS)
    size = (
        16 if quick else (64 if pictures else 16) if machine.accelerator else 32 if pictures else 4
    )
    passes, most = 5, 2000 if machine.accelerator else 200
    steps = 8 if quick else max(50, min(most, passes * looked.count // size))
    rates = RATES["small" if model in OWN_KNOWLEDGE or model == "shapes-llava" else "usual"]
    if quick:
        rates = {variant: own[:1] for variant, own in rates.items()}
    experiment: dict[str, Any] = {
        "name": name,
        "title": f"{model} learns {name}",
        "model": model,
        "suite": str(folder / "suite.yaml"),
        "rank": 8 if looked.count < 5000 else 16,
        "seeds": [0] if quick or not machine.accelerator else [0, 1],
        "calibration": {"data": dict(kept), "samples": 32 if quick else 256, "batch_size": size},
        "task": {"data": {**looked.part("train"), **({"limit": 256} if quick else {})}},
        "training": {"steps": steps, "batch_size": size, **({} if pictures else {"loss": "next_token"})},
        "evaluation": {"limit": 60} if quick else {},
        "variants": {
            "corda-natural": {"learning_rates": rates["corda-natural"]},
            "natural-distill": {"method": "corda-natural", "distill": 30, "learning_rates": rates["natural-distill"]},
            "lora": {"learning_rates": rates["lora"]},
        },
    }  # fmt: skip
    if looked.is_ == CLASSES:
        experiment["towers"] = ["vision"]
        experiment["task"]["classes"] = list(looked.classes)
    if quick:
        experiment["gradient"] = {"batches": 2, "batch_size": size}
    return {key: value for key, value in experiment.items() if value != {}}


def write_starter(
    folder: Path, experiment: Mapping[str, Any], suite: Mapping[str, Any], command: str, quick: bool
) -> Path:
    """Write `experiment.yaml` and `suite.yaml`, and return the first.

    Args:
        command: what was typed, for the first lines.

    Raises:
        CordaError: what would be written is no experiment or no suite; nothing is written then.
    """
    config = folder / "experiment.yaml"
    with TemporaryDirectory() as place:
        tried = {**experiment, "suite": f"{place}/suite.yaml"}
        write_text(Path(place) / "suite.yaml", _written(suite))
        write_text(Path(place) / "experiment.yaml", _written(tried))
        load_experiment(Path(place) / "experiment.yaml")
        load_suite(Path(place) / "suite.yaml")
    head = f"# corda-vlm run {config}\n#\n# Written by: {command}\n"
    head += (
        "# Quick: limits everywhere, which show that it works and measure nothing. Write it again without --quick for numbers.\n"
        if quick
        else "# The learning rates are where such models usually learn; widen them where the best is the first or the last.\n"
    )
    write_text(folder / "suite.yaml", f"# What {suite['name']} measures.\n{_written(suite)}")
    write_text(config, head + _written(experiment))
    return config


def _written(content: Mapping[str, Any]) -> str:
    """YAML with a line for each key, and for each of a list's or a mapping's items."""
    lines = []
    for key, value in content.items():
        if isinstance(value, dict) and key in ("calibration", "task", "variants"):
            lines += [f"{key}:", *(f"  {name}: {_flow(inner)}" for name, inner in value.items())]
        elif key == "tasks":
            lines += [f"{key}:", *(f"  - {_flow(task)}" for task in value)]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=2**30, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
