"""Data sets that other libraries bring: scikit-learn, Hugging Face datasets, torchvision."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from corda_vlm.data.paths import find_one, plain_file
from corda_vlm.data.sources.table import Table
from corda_vlm.data.spec import DataSpec
from corda_vlm.errors import DataError, UnknownNameError, first_line
from corda_vlm.extras import require

logger = logging.getLogger(__name__)

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def check_sklearn(spec: DataSpec, beside: str | Path | None = None) -> None:
    """The data set is one that is read. Raises `UnknownNameError` else."""
    if spec.location != "digits":
        raise UnknownNameError("scikit-learn data set", spec.location, ["digits"])


def read_sklearn(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """scikit-learn's bundled digits: 1,797 handwritten digits of 8×8 pixels in 17 shades of gray.

    They are the *test* part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak,
    1998, CC BY 4.0), dark ink on white here. The splits train 1,000, val 297 and test 500 are ours:
    stratified and the same always.
    """
    check_sklearn(spec, beside)
    digits: Any = require("sklearn.datasets", "data", "reading sklearn:digits").load_digits()
    # The transform of a model enlarges by interpolation; eight-bit gray with ink dark on white, as on paper.
    pictures = (255 - digits.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8)
    labels = digits.target.tolist()
    return Table(
        size=len(labels),
        columns={"label": labels},
        images={"image": lambda row: pictures[row]},
        place=lambda row: f"scikit-learn digits, record {row}",
        class_names={"label": DIGIT_NAMES},
        splits={"train": 1000, "val": 297, "test": 500},
    )


def check_hf(spec: DataSpec, beside: str | Path | None = None) -> None:
    """A data set that is written as a path is there; whether a hub has one is not asked. Raises `DataError`."""
    if spec.location.startswith((".", "~", "/")):
        find_one(spec.location, beside)


def read_hf(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """A Hugging Face data set: a hub name, a folder that `datasets` can load, or one of `save_to_disk`."""
    import datasets

    folder = _local_folder(spec, beside)
    loaded = _load_hf(spec, folder)
    own_split = isinstance(loaded, Mapping) and spec.split in loaded
    data = _part_of(loaded, spec) if isinstance(loaded, Mapping) else loaded
    classes = {n: f.names for n, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    pictures = sorted(n for n, f in data.features.items() if isinstance(f, datasets.Image))
    for name in pictures:  # bytes; we decode, and count failures
        data = data.cast_column(name, datasets.Image(decode=False))
    rest = data.remove_columns(pictures)
    return Table(
        size=len(data),
        columns={name: list(rest[name]) for name in rest.column_names},
        images={name: (lambda row, name=name: data[row][name]) for name in pictures},
        place=lambda row: f"{spec}, row {row}",
        class_names=classes,
        base=folder,
        split=own_split,
    )


def hf_splits(spec: DataSpec, beside: str | Path | None = None) -> list[str]:
    """The splits of a Hugging Face data set; none where it is a single table. Raises `DataError` if it cannot be loaded."""
    loaded = _load_hf(spec, _local_folder(spec, beside))
    return [str(name) for name in loaded] if isinstance(loaded, Mapping) else []


def _local_folder(spec: DataSpec, beside: str | Path | None) -> Path | None:
    """The folder that a data set lies in; None for one of a hub."""
    try:
        folder = find_one(spec.location, beside)
    except DataError:
        return None
    if not folder.is_dir():
        plain_file(folder)
    return folder


def _load_hf(spec: DataSpec, folder: Path | None) -> Any:
    """What `datasets` loads: a data set, or a mapping of its splits."""
    import datasets

    marks = ("state.json", "dataset_dict.json")
    try:
        if folder is not None and any((folder / mark).exists() for mark in marks):
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder or spec.location), spec.config)
    except Exception as error:  # of any of the libraries that `datasets` reads with
        if folder is None and (snapshot := _snapshot(spec.location)) is not None:
            logger.warning("%s: the hub was not reached; read from its cache, %s", spec, snapshot)
            return _load_hf(spec, snapshot)
        raise DataError(
            f"{spec}: `datasets` cannot load it ({first_line(error)}); give a hub name that can be reached, "
            "or a local folder"
        ) from error


def _snapshot(name: str) -> Path | None:
    """Where the hub's cache has a data set (`hf download --repo-type dataset`), of which `datasets` does not know; None if it has none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _part_of(splits: Mapping[Any, Any], spec: DataSpec) -> Any:
    """The split that a spec asks for, or the only one there is."""
    if spec.split is None and len(splits) > 1:
        raise DataError(f"{spec}: say which split: {', '.join(map(str, splits))}")
    if spec.split is not None and spec.split not in splits and spec.splits is None:
        raise UnknownNameError(f"split of {spec.location}", spec.split, map(str, splits))
    # With `splits` a part is cut out of a source that has one split only.
    return splits[spec.split] if spec.split in splits else next(iter(splits.values()))


def read_torchvision(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """A classification set of `torchvision.datasets`, from `root` (nothing is fetched unless `download`)."""
    kind = _torchvision_kind(spec)
    root = torchvision_root(spec, beside)
    part = _torchvision_part(kind, spec)
    accepted = inspect.signature(kind).parameters
    fetching = {"download": spec.download} if "download" in accepted else {}
    try:
        data: Any = kind(str(root), **part, **fetching)
        labels = _torchvision_labels(data)
    except Exception as error:  # of any of the formats that torchvision reads
        raise DataError(
            f"{spec}: torchvision cannot read it in {root} ({first_line(error)}); "
            "set download: true to fetch it, or put its files there"
        ) from error
    classes = next(
        (getattr(data, name) for name in ("classes", "categories") if hasattr(data, name)), None
    )
    return Table(
        size=len(labels),
        columns={"label": labels},
        images={"image": lambda row: data[row][0]},
        place=lambda row: f"{spec}, record {row}",
        class_names={} if classes is None else {"label": [str(name) for name in classes]},
        split=bool(part),
    )


def _torchvision_kind(spec: DataSpec) -> Any:
    """The class of a data set. Raises `UnknownNameError` where there is none of this name."""
    import torchvision

    kinds: dict[str, Any] = {
        name: kind
        for name, kind in vars(torchvision.datasets).items()
        if inspect.isclass(kind) and "root" in inspect.signature(kind).parameters
    }
    if spec.location not in kinds:
        raise UnknownNameError("torchvision data set", spec.location, kinds)
    return kinds[spec.location]


def _torchvision_part(kind: Any, spec: DataSpec) -> dict[str, Any]:
    """The keywords by which a data set gives the split that is asked for; {} where it has none of its own."""
    accepted = inspect.signature(kind).parameters
    if spec.splits is not None or spec.split is None:
        return {}
    if "split" in accepted:
        return {"split": spec.split}
    if "train" not in accepted:
        return {}
    if spec.split not in ("train", "test"):
        raise UnknownNameError(f"split of {spec.location}", spec.split, ["train", "test"])
    return {"train": spec.split == "train"}


def torchvision_root(spec: DataSpec, beside: str | Path | None = None) -> Path:
    """The folder that holds the data set, or gets it. Raises `DataError` if none is named, or it is not there."""
    if spec.root is None:
        raise DataError(f"{spec}: give root: the folder that holds (or shall hold) the data set")
    return Path(spec.root) if spec.download else find_one(spec.root, beside)


def _torchvision_labels(data: Any) -> list[int]:
    """The labels without decoding pictures, where the data set keeps them under one of the usual names."""
    for name in ("targets", "labels", "_labels", "y"):
        values = getattr(data, name, None)
        if values is not None and len(values) == len(data):
            return [int(value) for value in values]
    for name in ("_samples", "samples", "imgs"):
        values = getattr(data, name, None)
        if values is not None and len(values) == len(data):
            return [int(sample[1]) for sample in values]
    return [int(data[row][1]) for row in range(len(data))]
