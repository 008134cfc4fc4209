"""Each kind of source gives the same records, and what is wrong with a file is said by its name."""

from __future__ import annotations

import gzip
import shutil
import struct
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from corda_vlm.data import load_records
from corda_vlm.errors import CordaError, DataError, UnknownNameError


def _check(data, digits, count):
    assert len(data) == count
    for record in data:
        assert record["image"].size == (8, 8)
    pixels = {np.asarray(record["image"]).tobytes() for record in data}
    assert len(pixels) > count * 0.9


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


def test_parquet(parquet, digits):
    data = load_records({"source": f"parquet:{parquet}/part*.parquet", "label": "word"})
    _check(data, digits, 60)
    assert data.class_names == tuple(
        sorted({"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"})
    )
    assert [data.class_names[label] for label in data.labels[:3]] == ["zero", "one", "two"]
    assert data[0]["tags"] == ["digit", "zero"]
    assert data.place(31).endswith("part1.parquet, row 1")
    numbers = load_records({"source": f"parquet:{parquet}/part0.parquet", "label": "number"})
    assert numbers.labels == [label for _, label in digits[:30]]
    assert numbers.class_names == tuple("0123456789")


def test_parquet_filters(parquet):
    where = {"word": ["one", "two"], "split": "train"}
    data = load_records(
        {"source": f"parquet:{parquet}/part0.parquet", "label": "word", "where": where}
    )
    assert data.class_names == ("one", "two")
    assert {record["word"] for record in data} == {"one", "two"}
    held = load_records(
        {"source": f"parquet:{parquet}/*.parquet", "split": "heldout", "label": "word"}
    )
    assert len(held) == 12
    with pytest.raises(
        DataError, match=r"no record has split = 'tset'; its values are: heldout, train"
    ):
        load_records({"source": f"parquet:{parquet}/*.parquet", "split": "tset"})
    with pytest.raises(UnknownNameError, match=r"unknown column .*'colour'"):
        load_records({"source": f"parquet:{parquet}/*.parquet", "where": {"colour": 1}})


def test_parquet_of_hugging_face_structs(tmp_path, digits):
    images = [{"bytes": picture, "path": None} for picture, _ in digits[:5]]
    pq.write_table(
        pa.table({"image": images, "label": [label for _, label in digits[:5]]}),
        tmp_path / "a.parquet",
    )
    _check(load_records(f"parquet:{tmp_path}/a.parquet"), digits, 5)


def test_parquet_row_groups_one_at_a_time(parquet, digits, monkeypatch):
    from corda_vlm.data.sources import parquet as reader

    monkeypatch.setattr(reader, "_KEEP_IN_MEMORY", 0)
    data = load_records(f"parquet:{parquet}/*.parquet")
    order = np.random.RandomState(0).permutation(60)
    small = load_records({"source": f"parquet:{parquet}/*.parquet", "label": None})
    for index in order:
        assert data[int(index)]["image"].tobytes() == small[int(index)]["image"].tobytes()


@pytest.mark.parametrize("damage", ["short", "foreign", "empty"])
def test_damaged_parquet_is_named(parquet, damage):
    path = parquet / "part0.parquet"
    content = {"short": path.read_bytes()[:500], "foreign": b"PK\x03\x04" * 99, "empty": b""}[
        damage
    ]
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"part0\.parquet: not a readable parquet file"):
        load_records(f"parquet:{parquet}/*.parquet")


def test_folder(folder, digits):
    train = load_records({"source": f"folder:{folder}", "split": "train"})
    test = load_records({"source": f"folder:{folder}", "split": "test"})
    _check(train, digits, 40)
    assert len(test) == 20
    assert train[0]["class_name"] == train.class_names[train[0]["label"]] == "eight"
    with pytest.raises(UnknownNameError, match="choose one of: test, train"):
        load_records({"source": f"folder:{folder}", "split": "val"})
    assert len(load_records(f"folder:{folder / 'train'}")) == 40
    with pytest.raises(DataError, match=r"holds parts, not classes; say which split: test, train"):
        load_records(f"folder:{folder}")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in folders"):
        load_records(f"folder:{folder / 'empty'}")


def test_webdataset(shards, digits):
    data = load_records(f"webdataset:{shards}/digits-{{000..001}}.tar")
    _check(data, digits, 20)
    assert data.labels == [label for _, label in digits[:20]]
    assert data[1]["text"] == "the digit one"
    assert data[11]["source"] == "s11"
    assert "digits-001.tar, record" in data.place(11)
    assert len(load_records(f"webdataset:{shards}/*.tar")) == 20


def test_damaged_shards_are_named(shards):
    path = shards / "digits-001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(DataError, match=r"digits-001\.tar: not a readable tar shard"):
        load_records(f"webdataset:{shards}/*.tar")
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match=r"digits-001\.tar: .*compressed"):
        load_records(f"webdataset:{shards}/*.tar")


def test_jsonl(captions, digits):
    data = load_records(f"jsonl:{captions}")
    _check(data, digits, 20)
    assert data[0]["text"] == "a zero"
    assert data.class_names is None
    captions.write_text('{"image": "0.png", "caption": "a zero"}\n{"image": \n')
    with pytest.raises(DataError, match=r"captions\.jsonl, line 2: not a JSON record"):
        load_records(f"jsonl:{captions}")
    captions.write_text('{"image": "0.png", "caption": null}\n')
    with pytest.raises(DataError, match=r"line 1: caption is None, which is no text"):
        load_records(f"jsonl:{captions}")


def test_texts_alone(shared_data):
    data = load_records(
        {"source": f"jsonl:{shared_data}/nq_open_dev_3610.jsonl", "text": "question", "limit": 50}
    )
    assert len(data) == 50
    assert all(record["image"] is None and len(record["text"]) > 10 for record in data)


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
    _check(data, digits, 12)
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


# ------------------------------------------------------------------ paths


def test_paths_as_given_beside_the_config_and_shipped(captions, tmp_path, monkeypatch):
    config = captions.parent / "run.yaml"
    assert len(load_records("jsonl:captions.jsonl", beside=config)) == 20
    monkeypatch.chdir(captions.parent)
    assert len(load_records("jsonl:captions.jsonl")) == 20
    monkeypatch.setenv("HERE", str(captions.parent))
    assert len(load_records("jsonl:$HERE/capt*.jsonl")) == 20
    shipped = load_records({"source": "parquet:model_zoo/emoji-clip/data/noto.parquet", "limit": 3})
    assert len(shipped) == 3


def test_missing_paths_say_where_was_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"nothing\.jsonl.*looked at.*conf/nothing\.jsonl"):
        load_records("jsonl:nothing.jsonl", beside=tmp_path / "conf" / "a.yaml")
    with pytest.raises(DataError, match=r"no data matches '\*\.tar'"):
        load_records("webdataset:*.tar")
    with pytest.raises(DataError, match="environment variable"):
        load_records("jsonl:$CORDA_NOWHERE/a.jsonl")


def test_unknown_kinds_and_options():
    with pytest.raises(UnknownNameError, match="Did you mean 'parquet'"):
        load_records("parqet:a")
    with pytest.raises(UnknownNameError, match="choose one of"):
        load_records("photos")
    with pytest.raises(UnknownNameError, match="Did you mean 'limit'"):
        load_records({"source": "sklearn:digits", "limits": 3})
    with pytest.raises(DataError, match="without a source"):
        load_records({"limit": 3})
    with pytest.raises(CordaError, match="limit is 0"):
        load_records({"source": "sklearn:digits", "limit": 0})
