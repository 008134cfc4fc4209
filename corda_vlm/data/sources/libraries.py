"""Data sets that other libraries bring: scikit-learn, Hugging Face datasets, torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from corda_vlm.data.paths import find_one, plain_file
from corda_vlm.data.sources.table import Table
from corda_vlm.data.spec import DataSpec
from corda_vlm.errors import DataError, UnknownNameError, first_line
from corda_vlm.extras import require

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
    found: Any = require("sklearn.datasets", "data", "reading sklearn:digits").load_digits()
    # The transform of a model enlarges by interpolation; eight-bit gray with ink dark on white, as on paper.
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


def check_hf(spec: DataSpec, beside: str | Path | None = None) -> None:
    """A data set that is written as a path is there; whether a hub has one is not asked. Raises `DataError`."""
    if spec.location.startswith((".", "~", "/")):
        find_one(spec.location, beside)


def read_hf(spec: DataSpec, beside: str | Path | None = None) -> Table:
    """A Hugging Face data set: a hub name, a folder that `datasets` can load, or one of `save_to_disk`."""
    import datasets

    try:
        folder = find_one(spec.location, beside)
    except DataError:
        folder = None
    if folder is not None and not folder.is_dir():
        plain_file(folder)
    try:
        if folder is not None and (
            (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
        ):
            found: Any = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder or spec.location), spec.config)
    except Exception as error:  # of any of the libraries that `datasets` reads with
        raise DataError(
            f"{spec}: `datasets` cannot load it ({first_line(error)}); give a hub name that can be reached, "
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
    import torchvision

    kinds: dict[str, Any] = {
        name: kind
        for name, kind in vars(torchvision.datasets).items()
        if inspect.isclass(kind) and "root" in inspect.signature(kind).parameters
    }
    if spec.location not in kinds:
        raise UnknownNameError("torchvision data set", spec.location, kinds)
    kind = kinds[spec.location]
    root = torchvision_root(spec, beside)
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
    try:
        found: Any = kind(str(root), **options)
        labels = _torchvision_labels(found)
    except Exception as error:  # of any of the formats that torchvision reads
        raise DataError(
            f"{spec}: torchvision cannot read it in {root} ({first_line(error)}); "
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


def torchvision_root(spec: DataSpec, beside: str | Path | None = None) -> Path:
    """The folder that holds the data set, or gets it. Raises `DataError` if none is named, or it is not there."""
    if spec.root is None:
        raise DataError(f"{spec}: give root: the folder that holds (or shall hold) the data set")
    return Path(spec.root) if spec.download else find_one(spec.root, beside)


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
