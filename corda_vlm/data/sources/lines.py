"""Records as text: JSON lines, JSON lists, tables of separated values, and plain documents."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corda_vlm.data.paths import find_paths, read_text
from corda_vlm.data.sources.table import USUAL, Table
from corda_vlm.data.spec import DataSpec
from corda_vlm.errors import DataError, brief


def read_jsonl(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """One JSON object a line; pictures are paths, relative to the file."""
    records: list[dict[str, Any]] = []
    places: list[str] = []
    paths = find_paths(spec.location, beside)
    for path in paths:
        # Not splitlines: it also cuts at U+2028, which JSON allows within a string.
        lines = enumerate(read_text(path).split("\n"), start=1)
        written = [(number, line) for number, line in lines if line.strip()]
        for number, line in _range(written, spec, path):
            record = _parsed(line, f"{path}, line {number}")
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: not a JSON record (not an object)")
            records.append(record)
            places.append(f"{path}, line {number}")
    return _table(records, places, paths[0].parent)


def read_json(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """JSON files, each a list of objects or an object that holds one such list; pictures are paths."""
    records: list[dict[str, Any]] = []
    places: list[str] = []
    paths = find_paths(spec.location, beside)
    for path in paths:
        content = read_text(path)
        found = _parsed(content, str(path)) if content.strip() else []
        if found == []:
            raise DataError(f"{path}: holds no record; it must be a list of objects")
        lists = [found] if isinstance(found, list) else []
        if isinstance(found, dict):
            lists = [v for v in found.values() if isinstance(v, list) and _all_objects(v)]
        if len(lists) != 1 or not _all_objects(lists[0]):
            raise DataError(
                f"{path}: must be a list of objects, or an object that holds one such list; for one object a line "
                "write jsonl: in place of json:"
            )
        for number, record in _range(list(enumerate(lists[0])), spec, path):
            records.append(record)
            name = f" (id {str(record['id'])[:80]})" if "id" in record else ""
            places.append(f"{path}, record {number}{name}")
    return _table(records, places, paths[0].parent)


def read_csv(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """A line with the names of the columns, then one record a line; pictures are paths, relative to the file.

    Cells are texts, those of columns that hold whole numbers alone are numbers (but not where a text is wanted), and
    empty ones are None.
    """
    separator = "\t" if spec.kind == "tsv" else spec.separator or ","
    records: list[dict[str, Any]] = []
    places: list[str] = []
    paths = find_paths(spec.location, beside)
    for path in paths:
        names: list[str] = []
        found: list[tuple[int, list[str]]] = []
        # Line breaks stay as they are within a cell in quotes.
        reader = csv.reader(
            io.StringIO(read_text(path), newline=""), delimiter=separator, strict=True
        )
        try:
            names = next(reader, [])
            at = reader.line_num + 1
            for cells in reader:
                if cells:  # else the line is blank
                    found.append((at, cells))
                at = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: not a line of separated values ({error})"
            ) from error
        _check_header(names, separator, path)
        for number, cells in _range(found, spec, path):
            if len(cells) != len(names):
                raise DataError(
                    f"{path}, line {number}: has {len(cells)} cells, and there are {len(names)} columns; put cells that "
                    f"hold a {separator!r} in quotes"
                )
            records.append({n: cell or None for n, cell in zip(names, cells, strict=True)})
            places.append(f"{path}, line {number}")
    return _table(_with_numbers(records, spec), places, paths[0].parent)


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


_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")


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


def read_documents(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """Plain files, one document each."""
    paths = [path for path in find_paths(spec.location, beside) if path.is_file()]
    if not paths:
        raise DataError(f"{spec}: no file; text: takes files, e.g. text:books/*.txt")
    return Table(
        size=len(paths),
        columns={
            "text": [read_text(path) for path in paths],
            "path": [path.name for path in paths],
        },
        images={},
        place=lambda row: str(paths[row]),
        base=paths[0].parent,
    )


def _range(records: list[Any], spec: DataSpec, path: Path) -> list[Any]:
    """The records that `spec.rows` asks for of one file."""
    if spec.rows is None:
        return records
    count = len(records)
    shares = any(isinstance(at, float) for at in spec.rows)
    start, stop = (round(at * count) if shares else int(at) for at in spec.rows)
    if not start < stop <= count:
        raise DataError(
            f"{path}: has {count} records, so there are no rows from {start} up to {stop} in it"
        )
    return records[start:stop]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON record ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # of which `json` keeps the last without a word
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {brief(max(names, key=names.count))} twice")
    return found


def _all_objects(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, Mapping) for value in values)


def _table(records: list[dict[str, Any]], places: list[str], base: Path) -> Table:
    names = dict.fromkeys(name for record in records for name in record)
    return Table(
        size=len(records),
        columns={name: [record.get(name) for record in records] for name in names},
        images={},
        place=lambda row: places[row],
        base=base,
    )
