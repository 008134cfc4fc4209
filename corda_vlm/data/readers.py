"""The sources: each reader turns a `DataSpec` into a `Table` without decoding a picture."""

from __future__ import annotations

import bisect
import itertools
import json
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corda_vlm.data.images import IMAGE_SUFFIXES
from corda_vlm.data.spec import DataSpec, find_paths
from corda_vlm.data.table import Table
from corda_vlm.errors import DataError, UnknownNameError

Reader = Callable[[DataSpec, "str | Path | None"], Table]

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_KEEP_IN_MEMORY = 2 << 30
"""Bytes of encoded pictures that a parquet source keeps in memory; more is read a row group at a time."""


def read_sklearn(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """scikit-learn's bundled digits: 1,797 handwritten digits of 8×8 pixels in 17 shades of grey.

    They are the *test* part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak,
    1998, CC BY 4.0), dark ink on white here. The splits train 1,000, val 297 and test 500 are ours:
    stratified and the same always.
    """
    if spec.location != "digits":
        raise UnknownNameError("scikit-learn data set", spec.location, ["digits"])
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    # The transform of a model enlarges by interpolation; eight-bit grey with ink dark on white, as on paper.
    pictures = (255 - found.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8)
    labels = found.target.tolist()
    return Table(
        size=len(labels),
        columns={"label": labels},
        images={"image": lambda row: pictures[row]},
        place=lambda row: f"scikit-learn digits, record {row}",
        class_names={"label": DIGIT_NAMES},
        splits={"train": 1000, "val": 297, "test": 500},
    )


# ------------------------------------------------------------------ parquet


def read_parquet(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """Parquet files with pictures as encoded bytes (or Hugging Face's {bytes, path}) beside other columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = find_paths(spec.location, beside)
    files, others = [], []
    try:
        for path in paths:
            file = pq.ParquetFile(path)
            pictures = [f.name for f in file.schema_arrow if _holds_bytes(f.type)]
            others.append(file.read([f.name for f in file.schema_arrow if f.name not in pictures]))
            files.append(_ParquetPictures(path, file, pictures))
        table = pa.concat_tables(others, promote_options="default")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({_first_line(error)})") from error
    starts = list(itertools.accumulate((file.rows for file in files), initial=0))

    def locate(row: int) -> tuple[_ParquetPictures, int]:
        index = bisect.bisect_right(starts, row) - 1
        return files[index], row - starts[index]

    def picture(column: str) -> Callable[[int], Any]:
        def get(row: int) -> Any:
            file, local = locate(row)
            return file.get(column, local)

        return get

    def place(row: int) -> str:
        file, local = locate(row)
        return f"{file.path}, row {local}"

    return Table(
        size=starts[-1],
        columns={name: table.column(name).to_pylist() for name in table.column_names},
        images={
            name: picture(name) for name in dict.fromkeys(c for file in files for c in file.columns)
        },
        place=place,
        base=paths[0].parent,
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


# ------------------------------------------------------------------ folders and archives


def read_folder(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """A folder with one folder a class, or with such folders for each split (train/, val/, test/)."""
    root = _one(find_paths(spec.location, beside), spec)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; folder: reads one folder a class")
    own_split = spec.split is not None and spec.splits is None
    if own_split:
        parts = sorted(path.name for path in root.iterdir() if path.is_dir())
        if spec.split not in parts:
            raise UnknownNameError(f"split of {root}", spec.split, parts)
        root = root / str(spec.split)
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
        try:
            # "r:" refuses compressed archives, in which no member can be read on its own.
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    if member.isfile() and stem and ending:
                        key = (path, f"{folder}/{stem}".removeprefix("./"))
                        records.setdefault(key, {})[ending.lower()] = (
                            member.offset_data,
                            member.size,
                        )
                _check_tail(path, archive.offset)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(
                f"{path}: not a readable tar shard ({_first_line(error)}); it may be cut short or compressed"
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
            for name in dict.fromkeys(name for record in parsed for name in record):
                columns.setdefault(name, [record.get(name) for record in parsed])
    except ValueError as error:
        raise DataError(
            f"{spec.location}: a txt, cls or json member cannot be read ({error})"
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


def read_jsonl(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """One JSON object a line; pictures are paths, relative to the file."""
    records: list[dict[str, Any]] = []
    places: list[str] = []
    paths = find_paths(spec.location, beside)
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("not an object")
                    records.append(record)
                    places.append(f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error})") from error
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not a JSON record ({error})") from error
    names = dict.fromkeys(name for record in records for name in record)
    return Table(
        size=len(records),
        columns={name: [record.get(name) for record in records] for name in names},
        images={},
        place=lambda row: places[row],
        base=paths[0].parent,
    )


# ------------------------------------------------------------------ other libraries


def read_hf(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """A Hugging Face data set: a hub name, a folder that `datasets` can load, or one of `save_to_disk`."""
    import datasets

    try:
        folder = _one(find_paths(spec.location, beside), spec)
    except DataError:
        folder = None
    try:
        if folder is not None and (
            (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
        ):
            found: Any = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder or spec.location), spec.config)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{spec}: `datasets` cannot load it ({_first_line(error)}); give a hub name that can be reached, "
            "or a local folder"
        ) from error
    own_split = isinstance(found, Mapping)
    if own_split:
        if spec.split is None and len(found) > 1:
            raise DataError(f"{spec}: say which split: {', '.join(map(str, found))}")
        if spec.split is not None and spec.split not in found and spec.splits is None:
            raise UnknownNameError(f"split of {spec.location}", spec.split, map(str, found))
        # With `splits` a part is cut out of a source that has one split only.
        own_split = spec.split in found
        found = found[spec.split] if own_split else found[next(iter(found))]
    pictures = {n for n, f in found.features.items() if isinstance(f, datasets.Image)}
    for name in pictures:
        found = found.cast_column(
            name, datasets.Image(decode=False)
        )  # bytes; we decode, and count failures
    rest = found.remove_columns(sorted(pictures))
    return Table(
        size=len(found),
        columns={name: list(rest[name]) for name in rest.column_names},
        images={name: (lambda row, name=name: found[row][name]) for name in sorted(pictures)},
        place=lambda row: f"{spec}, row {row}",
        class_names={
            n: f.names for n, f in found.features.items() if isinstance(f, datasets.ClassLabel)
        },
        base=folder,
        split=own_split,
    )


def read_torchvision(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """A classification set of `torchvision.datasets`, from `root` (nothing is fetched unless `download`)."""
    import inspect

    import torchvision

    kinds: dict[str, Any] = {
        name: kind
        for name, kind in vars(torchvision.datasets).items()
        if inspect.isclass(kind) and "root" in inspect.signature(kind).parameters
    }
    if spec.location not in kinds:
        raise UnknownNameError("torchvision data set", spec.location, kinds)
    if spec.root is None:
        raise DataError(f"{spec}: give root: the folder that holds (or shall hold) the data set")
    kind = kinds[spec.location]
    accepted = inspect.signature(kind).parameters
    options: dict[str, Any] = {}
    if spec.splits is None and spec.split is not None:
        if "split" in accepted:
            options["split"] = spec.split
        elif "train" in accepted:
            if spec.split not in ("train", "test"):
                raise UnknownNameError(f"split of {spec.location}", spec.split, ["train", "test"])
            options["train"] = spec.split == "train"
    own_split = bool(options)
    if "download" in accepted:
        options["download"] = spec.download
    root = Path(spec.root) if spec.download else _one(find_paths(spec.root, beside), spec)
    try:
        found: Any = kind(str(root), **options)
        labels = _torchvision_labels(found)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"{spec}: torchvision cannot read it in {root} ({_first_line(error)}); "
            "set download: true to fetch it, or put its files there"
        ) from error
    classes = next(
        (getattr(found, n) for n in ("classes", "categories") if hasattr(found, n)), None
    )
    return Table(
        size=len(labels),
        columns={"label": labels},
        images={"image": lambda row: found[row][0]},
        place=lambda row: f"{spec}, record {row}",
        class_names={} if classes is None else {"label": [str(name) for name in classes]},
        split=own_split,
    )


def _torchvision_labels(found: Any) -> list[int]:
    """The labels without decoding pictures, where the data set keeps them under one of the usual names."""
    for name in ("targets", "labels", "_labels", "y"):
        values = getattr(found, name, None)
        if values is not None and len(values) == len(found):
            return [int(value) for value in values]
    for name in ("_samples", "samples", "imgs"):
        values = getattr(found, name, None)
        if values is not None and len(values) == len(found):
            return [int(sample[1]) for sample in values]
    return [int(found[row][1]) for row in range(len(found))]


READERS: dict[str, Reader] = {
    "sklearn": read_sklearn,
    "parquet": read_parquet,
    "folder": read_folder,
    "webdataset": read_webdataset,
    "hf": read_hf,
    "torchvision": read_torchvision,
    "jsonl": read_jsonl,
}


def _one(paths: Sequence[Path], spec: DataSpec) -> Path:
    if len(paths) != 1:
        raise DataError(
            f"{spec}: names {len(paths)} paths, {paths[0]} and others; it must name one"
        )
    return paths[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
