"""Pictures as plain files, in one folder a class or all in one."""

from __future__ import annotations

from pathlib import Path

from corda_vlm.data.paths import find_one, unreadable
from corda_vlm.data.sources.images import IMAGE_SUFFIXES
from corda_vlm.data.sources.table import Table
from corda_vlm.data.spec import DataSpec
from corda_vlm.errors import DataError, UnknownNameError
from corda_vlm.files import shown

_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def read_folder(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """A folder with one folder a class, or with such folders for each split (train/, val/, test/); or of pictures without classes."""
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
        files = sorted(p for p in root.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(_nothing_in(root))
    paths = [str(path.relative_to(root)) for path in files]
    return Table(
        size=len(files),
        columns={"class_name": classes, "path": paths} if classes else {"path": paths},
        images={"image": lambda row: files[row]},
        place=lambda row: str(files[row]),
        split=own_split,
    )


def _nothing_in(root: Path) -> str:
    """Why a folder is of no use, and what to write in place of it."""
    if any((root / name).is_file() for name in _SAVED):
        return f"{root} is a data set that Hugging Face's library saved; write hf:{root}"
    if tables := sorted({path.suffix for path in root.iterdir() if path.suffix in _TABLES}):
        kind = _TABLES[tables[0]]
        return f"{root} holds no pictures, but {tables[0]} files; write {kind}:{root}/*{tables[0]}"
    return (
        f"{root} holds no pictures; folder: reads one folder a class, or pictures without classes, with files that end in "
        f"{', '.join(sorted(IMAGE_SUFFIXES))}"
    )


_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
_TABLES = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}
