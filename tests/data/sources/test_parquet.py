"""Parquet files are read with their pictures, and one that is damaged is named."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corda_vlm.data import load_records
from corda_vlm.errors import DataError, UnknownNameError
from tests.data.pictures import check_digits


def test_parquet(parquet, digits):
    data = load_records({"source": f"parquet:{parquet}/part*.parquet", "label": "word"})
    check_digits(data, 60)
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
    check_digits(load_records(f"parquet:{tmp_path}/a.parquet"), 5)


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
