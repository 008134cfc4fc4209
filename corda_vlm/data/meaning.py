"""What the rows of a table mean: their class, their text, and which of them are drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from corda_vlm.data.columns import formatted, is_whole
from corda_vlm.data.paths import find_one, read_text
from corda_vlm.data.sources.table import Table, shuffled_within_classes
from corda_vlm.data.spec import DataSpec, Name
from corda_vlm.errors import DataError, brief

_MOST_CLASSES = 1_000_000
"""Beyond it a number is no label but something else, e.g. an id."""


def label_rows(
    table: Table, column: str | None, rows: np.ndarray, spec: DataSpec, beside: str | Path | None
) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """Class indices of `rows` and the classes' names, from a column of numbers or of strings."""
    if column is None:
        if spec.classes is not None:
            raise DataError(f"{spec}: classes are given, but no label column; name it with label:")
        return None, None
    values = [table.columns[column][int(row)] for row in rows]
    for row, value in zip(rows, values, strict=True):
        if value is None or isinstance(value, (list, dict)) or value != value:
            raise DataError(
                f"{table.place(int(row))}: {column} is {brief(value)}, which is no label"
            )
    given = _listed(spec.classes, beside)
    if given is not None and len(set(given)) < len(given):
        twice = next(name for number, name in enumerate(given) if name in given[:number])
        raise DataError(f"{spec}: classes has {twice!r} twice; each class has one number")
    numbers = all(isinstance(value, (int, np.integer, bool)) for value in values)
    if numbers:
        labels = [int(value) for value in values]
        known = given or table.class_names.get(column)
        if not known and max(labels, default=0) >= _MOST_CLASSES:
            where = table.place(int(rows[labels.index(max(labels))]))
            raise DataError(
                f"{where}: {column} is {brief(max(labels))}, which would be more than {_MOST_CLASSES:,} classes; "
                "name them with classes:"
            )
        classes = (
            list(known) if known else [str(number) for number in range(max(labels, default=-1) + 1)]
        )
    else:
        classes = list(given or sorted({str(value) for value in values}))
        index = {name: number for number, name in enumerate(classes)}
        labels = [index.get(str(value), -1) for value in values]
    for row, label, value in zip(rows, labels, values, strict=True):
        if not 0 <= label < len(classes):
            raise DataError(
                f"{table.place(int(row))}: {column} {brief(value)} is none of the {len(classes)} classes; "
                "complete classes:, or filter with where:"
            )
    return labels, _display_names(classes, spec, beside)


def _display_names(
    classes: list[str], spec: DataSpec, beside: str | Path | None
) -> tuple[str, ...]:
    names = spec.names
    if isinstance(names, Mapping):
        missing = sorted(map(str, set(names) - set(classes)))
        if missing:
            raise DataError(f"{spec}: names has {missing[0]!r}, which is no class")
        return tuple(str(names.get(name, name)) for name in classes)
    listed = _listed(names, beside)
    if listed is None:
        return tuple(classes)
    if len(listed) != len(classes):
        raise DataError(f"{spec}: {len(listed)} names for {len(classes)} classes")
    return tuple(listed)


def _listed(value: Sequence[Name] | str | None, beside: str | Path | None) -> list[str] | None:
    """A list, or the list in a file (JSON, or one a line)."""
    if not isinstance(value, str):
        return None if value is None else [str(item) for item in value]
    path = find_one(value, beside)
    text = read_text(path)
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON list of names ({error})") from error
    if not isinstance(names, list) or not all(_is_name(item) for item in names):
        raise DataError(f"{path}: not a JSON list of names")
    return [str(item) for item in names]


def _is_name(item: object) -> bool:
    return isinstance(item, (str, int, float)) and not isinstance(item, bool)


def text_rows(
    table: Table,
    asked: str | None,
    column: str | None,
    rows: np.ndarray,
    labels: list[int] | None,
    class_names: tuple[str, ...] | None,
) -> list[str] | None:
    """The texts of `rows`, from a column or from a format string over the columns; None if there are none."""
    if asked is not None and "{" in asked:
        return [
            _formatted(table, asked, int(row), i, labels, class_names) for i, row in enumerate(rows)
        ]
    if column is None:
        return None
    texts = []
    for row in rows:
        value = table.columns[column][int(row)]
        if isinstance(value, (list, tuple)) and value:
            value = value[
                0
            ]  # several captions of one picture: the first; all stay in the record's own column
        if not isinstance(value, str) or not is_whole(value):
            raise DataError(
                f"{table.place(int(row))}: {column} is {brief(value)}, which is no text"
            )
        texts.append(value)
    return texts


def _formatted(
    table: Table,
    template: str,
    row: int,
    index: int,
    labels: list[int] | None,
    class_names: tuple[str, ...] | None,
) -> str:
    values = {name: column[row] for name, column in table.columns.items()}
    if labels is not None and class_names is not None:
        values["class_name"] = class_names[labels[index]]
    return formatted(template, values, "text ")


def sample(spec: DataSpec, labels: list[int] | None, count: int) -> np.ndarray:
    """Which of `count` records `per_class` and `limit` leave, as indices."""
    chosen = np.arange(count)
    if spec.per_class is not None:
        if labels is None:
            raise DataError(f"{spec}: per_class needs labels; name their column with label:")
        order = shuffled_within_classes(labels, count, spec.seed)
        seen: dict[int, int] = {}
        kept = []
        for index in order:
            seen[labels[index]] = seen.get(labels[index], 0) + 1
            if seen[labels[index]] <= spec.per_class:
                kept.append(index)
        chosen = np.asarray(kept)
    if spec.limit is not None and spec.limit < len(chosen):
        # A prefix of one permutation: limit 100 is a part of limit 200.
        chosen = chosen[np.random.RandomState(spec.seed).permutation(len(chosen))[: spec.limit]]
    return chosen
