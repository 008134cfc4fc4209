"""From a spec to records: what a source's rows mean, and which of them are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from corda_vlm.data.meaning import label_rows, sample, text_rows
from corda_vlm.data.paths import find_one
from corda_vlm.data.records import ImageTextData, take
from corda_vlm.data.sources.registry import SOURCES
from corda_vlm.data.sources.table import Table, cut, pick_column, select_rows
from corda_vlm.data.spec import DataSpec, parse_spec
from corda_vlm.data.text.formats import conversations
from corda_vlm.data.text.instruction import InstructionData
from corda_vlm.data.text.registry import FORMATS, written_as
from corda_vlm.errors import DataError


def load_records(
    spec: str | Mapping[str, Any] | DataSpec, *, beside: str | Path | None = None
) -> ImageTextData | InstructionData:
    """Read a source's records; pictures are decoded only when a record is looked at.

    Args:
        spec: "kind:where", or a mapping of `DataSpec`'s fields, or a `DataSpec`.
        beside: the file that names the data; relative paths may be relative to it.

    Returns:
        `InstructionData` where the spec names a `format`, else `ImageTextData`.

    Raises:
        UnknownNameError: an unknown kind, option, column, split or class.
        DataError: nothing there, unreadable, empty, a record without its label, or more records of no use than
            `max_bad_share` allows.
    """
    spec = parse_spec(spec)
    table = read_table(spec, beside)
    columns = {kind: pick_column(table, kind, asked, spec) for kind, asked in _asked(spec).items()}
    splits = spec.splits or (None if "split" in table.columns or table.split else table.splits)
    rows = select_rows(table, _filter(table, spec, splits), spec)
    labels, class_names = label_rows(table, columns["label"], rows, spec, beside)
    if splits and spec.split is not None:
        part = _part(table, rows, splits, spec.split, labels, spec)
        rows, labels = rows[part], take(labels, part)
    chosen = sample(spec, labels, len(rows))
    rows, labels = rows[chosen], take(labels, chosen)
    kind = ImageTextData if spec.format is None else InstructionData
    if spec.format is None:
        texts = text_rows(table, spec.text, columns["text"], rows, labels, class_names)
    else:
        texts = _documents(table, rows, spec.format)
    if len(rows) == 0:
        raise DataError(f"{spec}: not one record is left after split, filter and sampling")
    if kind is ImageTextData and columns["image"] is None and texts is None:
        raise DataError(
            f"{spec}: neither pictures nor texts were found; its columns are {', '.join(table.names)}: "
            + (
                f"write {line}"
                if (line := written_as(table.columns))
                else "name them with image: and text:, or say which format: of conversations or questions it has"
            )
        )
    records = kind(
        table,
        rows,
        spec,
        texts=texts,
        labels=labels,
        class_names=class_names,
        image_column=columns["image"],
    )
    records.check()
    return records


def read_table(spec: DataSpec, beside: str | Path | None) -> Table:
    """All rows of a source, as its format has them."""
    source = SOURCES[spec.kind]
    table = source.read(spec, beside)
    if table.size == 0:
        raise DataError(f"{spec}: holds no record")
    if spec.root is not None and not source.own_root:
        table = replace(table, base=find_one(spec.root, beside))
    return table if spec.format is None else conversations(table, spec)


def _filter(
    table: Table, spec: DataSpec, splits: Mapping[str, float | int] | None
) -> dict[str, Any]:
    """The values of columns that records must have: what `where` asks for, and the split where a column names it."""
    where = dict(spec.where)
    if spec.split is not None and not splits and not table.split:
        if "split" not in table.columns:
            raise DataError(
                f"{spec}: has no split of its own; give splits, e.g. {{train: 0.8, test: 0.2}}, "
                "or where, a filter on a column"
            )
        where.setdefault("split", spec.split)
    return where


def _documents(table: Table, rows: np.ndarray, form: str) -> list[str] | None:
    """The texts of `rows`, if they are documents; None for conversations."""
    if FORMATS[form].talk is not None:
        return None
    return [table.columns["text"][int(row)] for row in rows]


def _part(
    table: Table,
    rows: np.ndarray,
    splits: Mapping[str, float | int],
    split: str,
    labels: list[int] | None,
    spec: DataSpec,
) -> np.ndarray:
    """Which of `rows` belong to a part; rows made of one thing are in one part, so numbers count these things."""
    if table.parents is None:
        return cut(splits, split, labels, len(rows), spec)
    parents = np.asarray(table.parents)[rows]
    distinct, member = np.unique(parents, return_inverse=True)
    chosen = cut(splits, split, None, len(distinct), spec)
    return np.flatnonzero(np.isin(member, chosen))


def _asked(spec: DataSpec) -> dict[str, str | None]:
    """The columns asked for; a text that is a format string is no column."""
    if (
        spec.format is not None
    ):  # the format finds texts and pictures; a label is only what the user names
        return {"image": None, "text": None, "label": None if spec.label == "auto" else spec.label}
    text = None if spec.text is not None and "{" in spec.text else spec.text
    return {"image": spec.image, "text": text, "label": spec.label}
