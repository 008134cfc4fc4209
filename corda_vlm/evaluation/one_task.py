"""Data as a suite of one task: what a person has at hand, measured without a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from corda_vlm.data.spec import DataSpec, names_source, parse_spec
from corda_vlm.evaluation.class_names import DEFAULT_TEMPLATES
from corda_vlm.yaml_file import parse_yaml

DataText = str | Mapping[str, Any]


def data_of(source: object) -> DataText | None:
    """The data that a text or a mapping names, e.g. "folder:photos/test" or "{source: 'jsonl:qa.jsonl', format: qa}"; None for
    one that names none.

    Raises:
        CordaError: a text that begins as a mapping and is not YAML.
    """
    if isinstance(source, str) and source.lstrip().startswith("{"):
        source = parse_yaml(source, "the data to measure on")
    if isinstance(source, Mapping):
        return source if "source" in source else None
    return source if isinstance(source, str) and names_source(source) else None


def suite_of(data: DataText) -> dict[str, Any]:
    """A suite, as a mapping, that measures on some data alone.

    Questions and conversations are answered and compared with their (last) answer, documents are predicted (perplexity), and anything
    else is pictures with labels, classified by prompts of the class names that the data has.

    Raises:
        UnknownNameError, DataError: as `parse_spec`.
    """
    spec = parse_spec(data)
    return {"name": "data", "version": 1, "tasks": [{"name": _name(spec), "role": "gain", **_measured(spec), "data": data}]}  # fmt: skip


def _measured(spec: DataSpec) -> dict[str, Any]:
    if spec.format is None:
        return {
            "kind": "zero_shot",
            "classes": {"from": "data"},
            "templates": list(DEFAULT_TEMPLATES),
        }
    if spec.format == "text" or spec.source.partition(":")[0] == "text":
        return {"kind": "perplexity"}
    return {"kind": "qa"}


def _name(spec: DataSpec) -> str:
    """What tables call it: the last part of its source that names something, and its split."""
    _, _, where = spec.source.partition(":")
    parts = [part for part in PurePath(where).parts if part not in ("/", "..") and "*" not in part]
    name = PurePath(parts[-1]).stem if parts else "data"
    split = f"-{spec.split}" if isinstance(spec.split, str) else ""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name) + split
