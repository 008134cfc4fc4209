"""Tar shards are read at any place, and one that is damaged is named."""

from __future__ import annotations

import gzip

import pytest

from corda_vlm.data import load_records
from corda_vlm.errors import DataError
from tests.data.pictures import check_digits


def test_webdataset(shards, digits):
    data = load_records(f"webdataset:{shards}/digits-{{000..001}}.tar")
    check_digits(data, 20)
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
