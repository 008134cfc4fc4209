"""Pictures and texts as plain files: class folders and tar shards."""

from __future__ import annotations

import json
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from corda_vlm.data.paths import find_one, find_paths, plain_file, unreadable
from corda_vlm.data.sources.images import IMAGE_SUFFIXES
from corda_vlm.data.sources.table import Table
from corda_vlm.data.spec import DataSpec
from corda_vlm.errors import DataError, UnknownNameError, brief, first_line
from corda_vlm.files import shown

_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def read_folder(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """A folder with one folder a class, or with such folders for each split (train/, val/, test/)."""
    root = find_one(spec.location, beside)
    if not root.is_dir():
        raise DataError(f"{shown(root)} is not a folder; folder: reads one folder a class")
    try:
        return _read_folder(root, spec)
    except (OSError, RecursionError) as error:
        raise unreadable(root, error) from error


def _read_folder(root: Path, spec: DataSpec) -> Table:
    own_split = spec.split is not None and spec.splits is None
    if own_split:
        parts = sorted(path.name for path in root.iterdir() if path.is_dir())
        if spec.split not in parts:
            raise UnknownNameError(f"split of {root}", spec.split, parts)
        root = root / str(spec.split)
    inner = [path for path in root.iterdir() if path.is_dir()]
    # The name of a part as a class gives plausible numbers.
    if not own_split and inner and all(path.name.lower() in _PARTS for path in inner):
        parts = sorted(path.name for path in inner)
        raise DataError(f"{root} holds parts, not classes; say which split: {', '.join(parts)}")
    files, classes = [], []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        inside = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        files += inside
        classes += [folder.name] * len(inside)
    if not files:
        raise DataError(
            f"{root} holds no pictures in folders; folder: reads one folder a class, "
            f"with files that end in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return Table(
        size=len(files),
        columns={"class_name": classes, "path": [str(path.relative_to(root)) for path in files]},
        images={"image": lambda row: files[row]},
        place=lambda row: str(files[row]),
        split=own_split,
    )


def read_webdataset(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """Tar shards in which files of one name and several endings are one record (000.jpg, 000.txt, 000.cls).

    The archives are indexed once and then read at any place; txt, cls and json members are read at once.
    """
    records: OrderedDict[tuple[Path, str], dict[str, tuple[int, int]]] = OrderedDict()
    for path in find_paths(spec.location, beside):
        size = plain_file(path).stat().st_size
        try:
            # "r:" refuses compressed archives, in which no member can be read on its own.
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    if member.isfile() and stem and ending:
                        key = (path, f"{folder}/{stem}".removeprefix("./"))
                        parts, ending = records.setdefault(key, {}), ending.lower()
                        if ending in parts:
                            raise tarfile.ReadError(f"it holds {shown(member.name)} twice")
                        if member.offset_data + member.size > size:
                            raise tarfile.ReadError(f"{shown(member.name)} is longer than the file")
                        parts[ending] = (member.offset_data, member.size)
                _check_tail(path, archive.offset)
        except Exception as error:  # what its headers say may be anything
            raise DataError(
                f"{shown(path)}: not a readable tar shard ({first_line(error)}); it may be cut short or compressed"
            ) from error
    keys, members = list(records), list(records.values())
    endings = dict.fromkeys(ending for record in members for ending in record)

    def raw(row: int, ending: str) -> bytes | None:
        if ending not in members[row]:
            return None
        offset, size = members[row][ending]
        with keys[row][0].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def picture(row: int) -> bytes | None:
        return next((raw(row, e) for e in members[row] if f".{e}" in IMAGE_SUFFIXES), None)

    def text(row: int, ending: str) -> str | None:
        found = raw(row, ending)
        return None if found is None else found.decode("utf-8").strip()

    columns: dict[str, list[Any]] = {"__key__": [key for _, key in keys]}
    try:
        for ending in ("txt", "text", "caption"):
            if ending in endings:
                columns[ending] = [text(row, ending) for row in range(len(keys))]
        if "cls" in endings:
            found = [text(row, "cls") for row in range(len(keys))]
            columns["cls"] = [None if value is None else int(value) for value in found]
        if "json" in endings:
            parsed = [json.loads(text(row, "json") or "{}") for row in range(len(keys))]
            strange = [record for record in parsed if not isinstance(record, dict)]
            if strange:
                raise ValueError(f"{brief(strange[0])} is no JSON object")
            for name in dict.fromkeys(name for record in parsed for name in record):
                columns.setdefault(name, [record.get(name) for record in parsed])
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(
            f"{spec.location}: a txt, cls or json member cannot be read ({first_line(error)})"
        ) from error
    has_pictures = any(f".{ending}" in IMAGE_SUFFIXES for ending in endings)
    return Table(
        size=len(keys),
        columns=columns,
        images={"image": picture} if has_pictures else {},
        place=lambda row: f"{keys[row][0]}, record {keys[row][1]}",
    )


def _check_tail(path: Path, offset: int) -> None:
    """An archive ends in blocks of zeros or with its last member; `tarfile` lets a torn header pass."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"a torn header at byte {offset}")
