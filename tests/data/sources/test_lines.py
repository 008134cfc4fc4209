"""JSON lines, JSON lists and parts of them are read as what they say."""

from __future__ import annotations

import pytest

from corda_vlm.data import load_records
from corda_vlm.errors import DataError
from tests.data.pictures import check_digits
from tests.data.text.written import write


def test_jsonl(captions, digits):
    data = load_records(f"jsonl:{captions}")
    check_digits(data, 20)
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


def test_rows_are_of_each_file_in_its_own_order(tmp_path):
    rows = [{"question": f"q{i}?", "answer": str(i)} for i in range(10)]
    write(tmp_path / "a.jsonl", rows[:4])
    write(tmp_path / "b.jsonl", rows[4:])
    spec = {"source": f"jsonl:{tmp_path}/{{a,b}}.jsonl", "format": "qa"}

    def asked(chosen):
        return [record["answer"] for record in load_records({**spec, "rows": chosen})]

    assert asked([0, 0.5]) == ["0", "1", "4", "5", "6"]
    assert asked([0.5, 1.0]) == ["2", "3", "7", "8", "9"], "the other halves"
    assert asked([0.5, 1]) == asked([0.5, 1.0])
    assert asked([1, 3]) == ["1", "2", "5", "6"]
    assert load_records({**spec, "rows": [1, 3]}).place(2) == f"{tmp_path}/b.jsonl, line 2"
    source = write(tmp_path / "c.json", rows)
    found = load_records({"source": source, "format": "qa", "rows": [8, 10]})
    assert [record["answer"] for record in found] == ["8", "9"]
    for chosen, why in (
        ([1, 5], r"a\.jsonl: has 4 records, so there are no rows from 1 up to 5"),
        ([3, 1], r"rows is \[3, 1\]"),
        ([1], r"it is \[start, stop\]"),
        ([0, 1], r"write \[0, 1\.0\] for all"),
        ([0.5, 2], r"shares of a file are from 0 to 1"),
    ):
        with pytest.raises(DataError, match=why):
            load_records({**spec, "rows": chosen})
    with pytest.raises(DataError, match="rows is for jsonl, json, csv and tsv"):
        load_records({"source": "sklearn:digits", "rows": [0, 0.5]})
