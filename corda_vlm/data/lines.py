"""Records as text: JSON lines, JSON lists, and plain documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corda_vlm.data.spec import DataSpec, find_paths
from corda_vlm.data.table import Table
from corda_vlm.errors import DataError


def read_jsonl(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """One JSON object a line; pictures are paths, relative to the file."""
    records: list[dict[str, Any]] = []
    places: list[str] = []
    paths = find_paths(spec.location, beside)
    for path in paths:
        # Not splitlines: it also cuts at U+2028, which JSON allows within a string.
        lines = enumerate(_content(path).split("\n"), start=1)
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
        content = _content(path)
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
            name = f" (id {record['id']})" if "id" in record else ""
            places.append(f"{path}, record {number}{name}")
    return _table(records, places, paths[0].parent)


def read_text(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """Plain files, one document each."""
    paths = [path for path in find_paths(spec.location, beside) if path.is_file()]
    if not paths:
        raise DataError(f"{spec}: no file; text: takes files, e.g. text:books/*.txt")
    return Table(
        size=len(paths),
        columns={"text": [_content(path) for path in paths], "path": [path.name for path in paths]},
        images={},
        place=lambda row: str(paths[row]),
        base=paths[0].parent,
    )


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


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
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON record ({error})") from error


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
