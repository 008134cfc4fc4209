"""Data sets of scikit-learn, Hugging Face and torchvision give the same records as files do."""

from __future__ import annotations

import shutil
import struct
from typing import Any

import datasets
import numpy as np
import pytest
from sklearn.datasets import load_digits

from corda_vlm.data import load_records
from corda_vlm.errors import DataError, UnknownNameError
from tests.data.pictures import check_digits


def test_sklearn_digits_splits_are_fixed_disjoint_and_stratified():
    parts = {
        name: load_records({"source": "sklearn:digits", "split": name})
        for name in ("train", "val", "test")
    }
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 1000,
        "val": 297,
        "test": 500,
    }
    rows = [set(part._rows.tolist()) for part in parts.values()]
    assert len(set.union(*rows)) == 1797
    for part in parts.values():
        counts = np.bincount(part.labels, minlength=10)
        assert counts.max() - counts.min() <= max(4, 0.05 * len(part))
    assert parts["train"].class_names == (
        "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    )  # fmt: skip
    record = parts["test"][3]
    original: Any = load_digits()
    row = int(parts["test"]._rows[3])
    assert record["label"] == original.target[row]
    np.testing.assert_allclose(
        np.asarray(record["image"])[..., 0], 255 - original.images[row] * 255 / 16, atol=0.5
    )
    # The split must never move: results of different versions would no longer compare.
    assert parts["test"]._rows[:6].tolist() == [0, 3, 11, 23, 24, 25]
    assert len(load_records("sklearn:digits")) == 1797


def test_hugging_face_from_disk_and_folder(tmp_path, folder, digits):
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=[*"abcdefghij"])}
    )
    rows = {
        "img": [{"bytes": p, "path": None} for p, _ in digits[:12]],
        "label": [n for _, n in digits[:12]],
    }
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)})
    whole["test"] = whole["train"].select(range(4))
    whole.save_to_disk(str(tmp_path / "saved"))
    data = load_records({"source": f"hf:{tmp_path / 'saved'}", "split": "train"})
    check_digits(data, 12)
    assert data.class_names == tuple("abcdefghij")
    with pytest.raises(DataError, match="say which split: train, test"):
        load_records(f"hf:{tmp_path / 'saved'}")
    with pytest.raises(UnknownNameError, match="unknown split"):
        load_records({"source": f"hf:{tmp_path / 'saved'}", "split": "dev"})
    shutil.rmtree(tmp_path / "saved")
    found = load_records({"source": f"hf:{folder}", "split": "test"})
    assert len(found) == 20
    assert found.class_names is not None


def test_hugging_face_that_cannot_be_had():
    with pytest.raises(DataError, match="cannot load it"):
        load_records("hf:nobody/never-was-there")


def test_torchvision_from_a_local_folder(tmp_path):
    """MNIST's own file format, filled with scikit-learn's digits."""
    found: Any = load_digits()
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, rows in (("train", slice(0, 100)), ("t10k", slice(100, 140))):
        images = np.kron(found.images[rows], np.ones((3, 3))).astype(np.uint8) * 15
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        labels = found.target[rows].astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, len(images), 28, 28) + images.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, len(labels)) + labels.tobytes()
        )
    spec = {"source": "torchvision:MNIST", "root": str(tmp_path)}
    train, test = (load_records({**spec, "split": split}) for split in ("train", "test"))
    assert (len(train), len(test)) == (100, 40)
    assert test.labels == found.target[100:140].tolist()
    assert test.class_names[3] == "3 - three"
    assert test[0]["image"].size == (28, 28)


def test_torchvision_errors(tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'CIFAR10'"):
        load_records({"source": "torchvision:CIFAR11", "root": str(tmp_path)})
    with pytest.raises(DataError, match="give root"):
        load_records("torchvision:CIFAR10")
    with pytest.raises(DataError, match="download: true"):
        load_records({"source": "torchvision:CIFAR10", "root": str(tmp_path), "split": "test"})
