"""Tables of separated values: a line with the names of the columns, then one record a line."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corda_vlm.data.paths import find_paths, read_text
from corda_vlm.data.sources.table import USUAL, Table, asked_rows, table_of
from corda_vlm.data.spec import DataSpec
from corda_vlm.errors import DataError, brief

_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")

Line = tuple[int, list[str]]
"""The number of a record's first line, and its cells."""


def read_csv(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """Values with commas between them, or with `spec.separator`; pictures are paths, relative to the file.

    Cells are texts, those of columns that hold whole numbers alone are numbers (but not where a text is wanted), and
    empty ones are None.
    """
    return _read_separated(spec, beside, spec.separator or ",")


def read_tsv(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """Values with tabs between them, otherwise as `read_csv`."""
    return _read_separated(spec, beside, "\t")


def _read_separated(spec: DataSpec, beside: str | Path | None, separator: str) -> Table:
    records: list[dict[str, Any]] = []
    places: list[str] = []
    paths = find_paths(spec.location, beside)
    for path in paths:
        names, lines = _lines(path, separator)
        _check_header(names, separator, path)
        for number, cells in asked_rows(lines, spec.rows, path):
            if len(cells) != len(names):
                raise DataError(
                    f"{path}, line {number}: has {len(cells)} cells, and there are {len(names)} columns; put cells that "
                    f"hold a {separator!r} in quotes"
                )
            records.append({n: cell or None for n, cell in zip(names, cells, strict=True)})
            places.append(f"{path}, line {number}")
    return table_of(_with_numbers(records, spec), places, paths[0].parent)


def _lines(path: Path, separator: str) -> tuple[list[str], list[Line]]:
    """The names in a file's first line, and the records of the others."""
    lines: list[Line] = []
    # Line breaks stay as they are within a cell in quotes.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=separator, strict=True)
    try:
        names = next(reader, [])
        first = reader.line_num + 1
        for cells in reader:
            if cells:  # else the line is blank
                lines.append((first, cells))
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not a line of separated values ({error})"
        ) from error
    return names, lines


def _check_header(names: Sequence[str], separator: str, path: Path) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(f"{path}: has the column {brief(min(twice))} twice; rename one of them")
    if not names:
        raise DataError(f"{path}: holds no record; its first line must name the columns")
    other = next((mark for mark in "\t;,|" if mark in names[0]), None)
    if len(names) == 1 and other is not None:
        remedy = "write tsv: in place of csv:" if other == "\t" else f"give separator: {other!r}"
        raise DataError(
            f"{path}: its first line has no {separator!r}, so that it is one column, {brief(names[0])}; {remedy}"
        )


def _with_numbers(records: list[dict[str, Any]], spec: DataSpec) -> list[dict[str, Any]]:
    """Columns of whole numbers as such, so that labels and filters go by numbers."""
    wanted = {spec.text, spec.question, spec.answer, spec.system, *USUAL["text"]}
    for name in dict.fromkeys(name for record in records for name in record):
        cells = [record[name] for record in records if record.get(name) is not None]
        if name in wanted or not cells or not all(map(_WHOLE_NUMBER.fullmatch, cells)):
            continue
        for record in records:
            if record.get(name) is not None:
                record[name] = int(record[name])
    return records
