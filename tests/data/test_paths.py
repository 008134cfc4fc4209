"""Paths in data specs are looked for where a person expects them, and it is said where."""

from __future__ import annotations

import pytest

from corda_vlm.data import load_records
from corda_vlm.errors import DataError


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
