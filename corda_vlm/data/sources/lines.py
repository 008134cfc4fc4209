"""Records as text: JSON lines, JSON lists, and plain documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corda_vlm.data.paths import find_paths, read_text
from corda_vlm.data.sources.table import Table, asked_rows, table_of
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
        for number, line in asked_rows(written, spec.rows, path):
            record = _parsed(line, f"{path}, line {number}")
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: not a JSON record (not an object)")
            records.append(record)
            places.append(f"{path}, line {number}")
    return table_of(records, places, paths[0].parent)


def read_json(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """JSON files, each a list of objects or an object that holds one such list; pictures are paths."""
    records: list[dict[str, Any]] = []
    places: list[str] = []
    paths = find_paths(spec.location, beside)
    for path in paths:
        for number, record in asked_rows(list(enumerate(_records(path))), spec.rows, path):
            records.append(record)
            name = f" (id {str(record['id'])[:80]})" if "id" in record else ""
            places.append(f"{path}, record {number}{name}")
    return table_of(records, places, paths[0].parent)


def _records(path: Path) -> list[dict[str, Any]]:
    """The list of objects that a JSON file holds."""
    content = read_text(path)
    parsed = _parsed(content, str(path)) if content.strip() else []
    if parsed == []:
        raise DataError(f"{path}: holds no record; it must be a list of objects")
    lists = [parsed] if isinstance(parsed, list) else []
    if isinstance(parsed, dict):
        lists = [v for v in parsed.values() if isinstance(v, list) and _all_objects(v)]
    if len(lists) != 1 or not _all_objects(lists[0]):
        raise DataError(
            f"{path}: must be a list of objects, or an object that holds one such list; for one object a line "
            "write jsonl: in place of json:"
        )
    return lists[0]


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


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON record ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):  # of which `json` keeps the last without a word
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {brief(max(names, key=names.count))} twice")
    return record


def _all_objects(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, Mapping) for value in values)
