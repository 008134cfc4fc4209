"""Tar shards in which files of one name and several endings are one record (000.jpg, 000.txt, 000.cls)."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corda_vlm.data.paths import find_paths, plain_file
from corda_vlm.data.sources.images import IMAGE_SUFFIXES
from corda_vlm.data.sources.table import Table
from corda_vlm.data.spec import DataSpec
from corda_vlm.errors import DataError, brief, first_line
from corda_vlm.files import shown

_TEXTS = ("txt", "text", "caption")


@dataclass(frozen=True)
class _Record:
    """One record of a shard: where each of its members lies.

    Attributes:
        shard: the archive.
        key: what its members have in common, their folder and name without endings.
        members: ending -> (offset in the archive, size), in bytes.
    """

    shard: Path
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)

    def bytes_of(self, ending: str) -> bytes | None:
        """A member as it is stored; None if the record has none of this ending."""
        if ending not in self.members:
            return None
        offset, size = self.members[ending]
        with self.shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def text(self, ending: str) -> str | None:
        stored = self.bytes_of(ending)
        return None if stored is None else stored.decode("utf-8").strip()

    def picture(self) -> bytes | None:
        """Its first picture."""
        pictures = (ending for ending in self.members if _shows(ending))
        return next((self.bytes_of(ending) for ending in pictures), None)


def read_webdataset(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """Tar shards, which are indexed once and then read at any place; txt, cls and json members are read at once."""
    shards = find_paths(spec.location, beside)
    records = [record for shard in shards for record in _indexed(shard)]
    endings = dict.fromkeys(ending for record in records for ending in record.members)
    try:
        columns = _columns(records, list(endings))
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(
            f"{spec.location}: a txt, cls or json member cannot be read ({first_line(error)})"
        ) from error
    return Table(
        size=len(records),
        columns=columns,
        images={"image": lambda row: records[row].picture()} if any(map(_shows, endings)) else {},
        place=lambda row: f"{records[row].shard}, record {records[row].key}",
    )


def _shows(ending: str) -> bool:
    """Are members of this ending pictures?"""
    return f".{ending}" in IMAGE_SUFFIXES


def _indexed(shard: Path) -> list[_Record]:
    """The records of an archive, in the order of their first members. Raises `DataError` where it is damaged."""
    records: dict[str, _Record] = {}
    size = plain_file(shard).stat().st_size
    try:
        # "r:" refuses compressed archives, in which no member can be read on its own.
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                _add(records, shard, size, member)
            _check_tail(shard, archive.offset)
    except Exception as error:  # what its headers say may be anything
        raise DataError(
            f"{shown(shard)}: not a readable tar shard ({first_line(error)}); it may be cut short or compressed"
        ) from error
    return list(records.values())


def _add(records: dict[str, _Record], shard: Path, size: int, member: tarfile.TarInfo) -> None:
    """Add a member of an archive of `size` bytes to its record."""
    folder, _, name = member.name.rpartition("/")
    stem, _, ending = name.partition(".")
    if not (member.isfile() and stem and ending):
        return
    key, ending = f"{folder}/{stem}".removeprefix("./"), ending.lower()
    record = records.setdefault(key, _Record(shard, key))
    if ending in record.members:
        raise tarfile.ReadError(f"it holds {shown(member.name)} twice")
    if member.offset_data + member.size > size:
        raise tarfile.ReadError(f"{shown(member.name)} is longer than the file")
    record.members[ending] = (member.offset_data, member.size)


def _columns(records: list[_Record], endings: list[str]) -> dict[str, list[Any]]:
    """The texts, classes and JSON objects of all records."""
    columns: dict[str, list[Any]] = {"__key__": [record.key for record in records]}
    for ending in _TEXTS:
        if ending in endings:
            columns[ending] = [record.text(ending) for record in records]
    if "cls" in endings:
        numbers = [record.text("cls") for record in records]
        columns["cls"] = [None if number is None else int(number) for number in numbers]
    if "json" in endings:
        objects = [_object(record) for record in records]
        for name in dict.fromkeys(name for one in objects for name in one):
            columns.setdefault(name, [one.get(name) for one in objects])
    return columns


def _object(record: _Record) -> dict[str, Any]:
    """The JSON member of a record, {} where there is none."""
    parsed = json.loads(record.text("json") or "{}")
    if not isinstance(parsed, dict):
        raise ValueError(f"{brief(parsed)} is no JSON object")
    return parsed


def _check_tail(path: Path, offset: int) -> None:
    """An archive ends in blocks of zeros or with its last member; `tarfile` lets a torn header pass."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"a torn header at byte {offset}")
