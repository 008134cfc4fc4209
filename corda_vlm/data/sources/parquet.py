"""Parquet files: the small columns at once, pictures when they are wanted."""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from corda_vlm.data.paths import find_paths, plain_file
from corda_vlm.data.sources.table import Table
from corda_vlm.data.spec import DataSpec
from corda_vlm.errors import CordaError, DataError, brief, first_line

_KEEP_IN_MEMORY = 2 << 30
"""Bytes of encoded pictures that a parquet source keeps in memory; more is read a row group at a time."""


def read_parquet(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """Parquet files with pictures as encoded bytes (or Hugging Face's {bytes, path}) beside other columns."""
    paths = find_paths(spec.location, beside)
    files, columns = _opened(paths)
    starts = list(itertools.accumulate((file.rows for file in files), initial=0))

    def locate(row: int) -> tuple[_ParquetPictures, int]:
        index = bisect.bisect_right(starts, row) - 1
        return files[index], row - starts[index]

    def picture(column: str, row: int) -> Any:
        file, local = locate(row)
        return file.get(column, local)

    def place(row: int) -> str:
        file, local = locate(row)
        return f"{file.path}, row {local}"

    names = dict.fromkeys(name for file in files for name in file.columns)
    return Table(
        size=starts[-1],
        columns=columns,
        images={name: partial(picture, name) for name in names},
        place=place,
        base=paths[0].parent,
    )


def _opened(paths: Sequence[Path]) -> tuple[list[_ParquetPictures], dict[str, list[Any]]]:
    """The files with their pictures unread, and the other columns of all of them."""
    import pyarrow as pa

    files: list[_ParquetPictures] = []
    others: list[Any] = []
    path = paths[0]
    try:
        for path in paths:
            file, other = _read_file(path)
            files.append(file)
            others.append(other)
        table = pa.concat_tables(others, promote_options="default")
        return files, {name: table.column(name).to_pylist() for name in table.column_names}
    except CordaError:
        raise
    except Exception as error:  # a reader that meets damage may raise anything
        path = _unreadable(others, paths) or path  # texts that are not UTF-8 show at the very end
        raise DataError(
            f"{path}: not a readable parquet file ({type(error).__name__}: {first_line(error)})"
        ) from error


def _read_file(path: Path) -> tuple[_ParquetPictures, Any]:
    """One file with its pictures unread, and a table of its other columns."""
    import pyarrow.parquet as pq

    # Checksums are there only where the writer made them; without, a flipped bit may pass.
    file = pq.ParquetFile(plain_file(path), page_checksum_verification=True)
    _check_columns(file, path)
    pictures = [f.name for f in file.schema_arrow if _holds_bytes(f.type)]
    others = [f.name for f in file.schema_arrow if f.name not in pictures]
    return _ParquetPictures(path, file, pictures), file.read(others)


def _unreadable(tables: Sequence[Any], paths: Sequence[Path]) -> Path | None:
    """The first file that was read, and whose values are nonsense."""
    for table, path in zip(tables, paths, strict=False):
        try:
            table.to_pylist()
        except Exception:
            return path
    return None


def _check_columns(file: Any, path: Path) -> None:
    names = file.schema_arrow.names
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(f"{path}: has the column {brief(min(twice))} twice; rename one of them")
    groups = range(file.metadata.num_row_groups)
    rows = sum(file.metadata.row_group(index).num_rows for index in groups)
    if rows != file.metadata.num_rows:
        raise DataError(
            f"{path}: is damaged: it says it has {file.metadata.num_rows:,} rows, and has {rows:,}"
        )


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


class _ParquetPictures:
    """The picture columns of one parquet file: all in memory if they are small, else a few row groups."""

    def __init__(self, path: Path, file: Any, columns: list[str]) -> None:
        self.path, self.file, self.columns = path, file, columns
        self.rows: int = file.metadata.num_rows
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        self.starts = list(itertools.accumulate((group.num_rows for group in groups), initial=0))
        self.small = sum(group.total_byte_size for group in groups) <= _KEEP_IN_MEMORY
        self.groups: OrderedDict[int, Any] = OrderedDict()

    def get(self, column: str, row: int) -> Any:
        if column not in self.columns:
            return None
        index = bisect.bisect_right(self.starts, row) - 1
        group = self.groups.get(index)
        if group is None:
            group = self.groups[index] = self.file.read_row_group(index, columns=self.columns)
            if not self.small and len(self.groups) > 8:
                self.groups.popitem(last=False)
        return group.column(column)[row - self.starts[index]].as_py()
