"""Conversations of every format become the same kind of records, faults counted."""

from __future__ import annotations

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corda_vlm.data import InstructionData, load_records
from corda_vlm.errors import DataError, UnknownNameError
from tests.data.text.written import asks, write


def test_llava_json(tmp_path, pictures):
    text_only = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}  # fmt: skip
    two = asks(1, "<image> and <image>: alike?", "Yes") | {"image": ["1.png", "2.png"]}
    source = write(tmp_path / "llava.json", [asks(0), text_only, two])
    data = load_records({"source": source, "format": "llava", "root": str(pictures)})
    assert isinstance(data, InstructionData)
    first, second, third = data
    assert first["messages"] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A digit."},
    ]
    assert first["image"].size == (8, 8)
    assert second["messages"][0] == {"role": "user", "content": "Hi"}
    assert second["images"] == []
    assert second["image"] is None
    kinds = [part["type"] for part in third["messages"][0]["content"]]
    assert kinds == ["image", "text", "image", "text"]
    assert len(third["images"]) == 2
    assert data.place(2) == f"{tmp_path / 'llava.json'}, record 2 (id r1)"
    assert len(data[1:]) == 2
    assert isinstance(data[1:], InstructionData)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (asks(1, "No place here"), "0 places for images, and the record has 1 images"),
        (asks(1, "<image> <image>"), "2 places for images, and the record has 1 images"),
        (asks(1) | {"image": None}, "1 places for images, but the record names no image"),
        (asks(1, answer=" "), "has an empty answer"),
        (asks(1) | {"conversations": []}, "holds no message"),
        (asks(1) | {"conversations": [{"from": "cat", "value": "x"}]}, "role 'cat'"),
        (asks(1) | {"conversations": [{"value": "x"}]}, "without 'from'"),
        (asks(1, answer=5), "its value is an int, not text"),
        (asks(1) | {"conversations": [{"from": "gpt", "value": "a <image>"}]}, "image in an answer"),
    ],
)  # fmt: skip
def test_a_record_of_no_use_is_named_or_counted(tmp_path, pictures, bad, told):
    source = write(tmp_path / "llava.json", [asks(0), bad])
    spec = {"source": source, "format": "llava", "root": str(pictures)}
    with pytest.raises(DataError, match=rf"1 of 2 records cannot be used.*\n.*llava.json, record 1 \(id r1\).*{told}"):  # fmt: skip
        load_records(spec)
    data = load_records({**spec, "max_bad_share": 0.5})
    assert [record["id"] for record in data] == ["r0"]
    assert data.skipped == 1
    with pytest.raises(DataError, match=told):
        _ = data[1]


def test_a_missing_or_damaged_image_is_a_bad_record(tmp_path, pictures):
    (pictures / "2.png").write_bytes(b"no picture")
    source = write(tmp_path / "llava.json", [asks(0), asks(2), asks(9)])
    spec = {"source": source, "format": "llava", "root": str(pictures), "max_bad_share": 0.9}
    data = load_records(spec)
    assert len(list(data)) == 1
    assert data.bad[1].startswith("no image that can be decoded: 2.png (Unidentified")
    assert "no file at" in data.bad[2]
    with pytest.raises(DataError, match=r"record 1 \(id r2\)"):
        list(load_records({**spec, "max_bad_share": 0.0}))


def test_chat_messages(tmp_path, digits):
    parts = [
        {"type": "text", "text": "What "},
        {"type": "image"},
        {"type": "text", "text": "is it?"},
    ]
    rows = [
        {"images": [{"bytes": digits[0][0], "path": None}],
         "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "<image>What?"},
                      {"role": "assistant", "content": "A zero"}]},
        {"images": [], "messages": [{"role": "user", "content": "say <image>"}, {"role": "assistant", "content": "no"}]},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
    data = load_records({"source": f"parquet:{tmp_path}/chat.parquet", "format": "chat"})
    first, second = data
    assert [m["role"] for m in first["messages"]] == ["system", "user", "assistant"]
    assert first["messages"][1]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert first["image"].size == (8, 8)
    assert second["messages"][0]["content"] == "say <image>", "text without pictures is text"

    (tmp_path / "0.png").write_bytes(digits[0][0])
    inline = [*parts[:1], {"type": "image", "path": "0.png"}, *parts[2:]]
    rows = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "x"}]}
            for c in (inline, [{"type": "text", "text": "plain"}])]  # fmt: skip
    data = load_records({"source": write(tmp_path / "chat.jsonl", rows), "format": "chat"})
    assert len(data[0]["images"]) == 1
    assert data[1]["messages"][0]["content"] == "plain"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("part", "refused"),
    [
        ({"type": "image", "path": "0.png"}, None),
        ({"type": "image_url", "image_url": {"url": "0.png", "detail": "low"}}, None),
        ({"type": "image_url", "image_url": "0.png"}, None),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,PICTURE"}}, None),
        (
            {"type": "image_url", "image_url": {"url": "https://a.org/0.png"}},
            r"https://a\.org/0\.png .*is not fetched; download it and give its path",
        ),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png,%89PNG"}},
            "read only where it is in base64",
        ),
    ],
)  # fmt: skip
def test_pictures_within_messages(tmp_path, pictures, part, refused, packed):
    encoded = base64.b64encode((pictures / "0.png").read_bytes()).decode()
    part = json.loads(json.dumps(part).replace("PICTURE", encoded))
    asked = [part, {"type": "text", "text": "What?"}]
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": "A zero"}]
    source = write(tmp_path / "chat.jsonl", [{"messages": json.dumps(said) if packed else said}])
    data = load_records({"source": source, "format": "chat", "root": str(pictures)})
    assert data.fingerprint
    if refused:
        with pytest.raises(DataError, match=refused):
            _ = data[0]
        return
    assert data[0]["image"].size == (8, 8)
    assert data[0]["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<image>\nWhat is it?", "What is it?"),
        ("What is it?\n<image>", "What is it?"),
        ("<image><image>\nAlike?", "Alike?"),
        ("This <image>\nand <image>: alike?", "This\nand: alike?"),
        ("One\n<image>\ntwo", "One\ntwo"),
        (" as it is ", " as it is "),
    ],
)
def test_pictures_left_out_take_their_places_with_them(tmp_path, text, left):
    """So that a model of text alone can read what was written about pictures."""
    turns = asks(0, text)["conversations"]
    spec = {"source": write(tmp_path / "a.json", [asks(0, text)]), "image": None}
    (record,) = load_records({**spec, "format": "llava"})
    assert record["messages"][0] == {"role": "user", "content": left}
    assert record["images"] == []
    said = [{"role": role, "content": turn["value"]} for role, turn in zip(("user", "assistant"), turns, strict=True)]  # fmt: skip
    inline = [{"type": "image", "path": "0.png"}, {"type": "text", "text": "<image>\nWhat?"}]
    more = [{"role": "user", "content": inline}, {"role": "assistant", "content": "A digit."}]
    source = write(tmp_path / "chat.json", [{"images": ["0.png"], "messages": said + more}])
    (record,) = load_records({**spec, "source": source, "format": "chat"})
    assert [m["content"] for m in record["messages"]] == [left, "A digit.", "What?", "A digit."]


def test_what_is_not_there_is_said(tmp_path):
    source = write(tmp_path / "qa.jsonl", [{"query2": "?", "answer": "!"}])
    with pytest.raises(DataError, match=r"no question column.*query2"):
        load_records({"source": source, "format": "qa"})
    with pytest.raises(UnknownNameError, match="question column"):
        load_records({"source": source, "format": "qa", "question": "asked"})
    with pytest.raises(DataError, match="no column 'conversations'"):
        load_records({"source": source, "format": "llava"})
    with pytest.raises(
        UnknownNameError, match="data format 'squad'; choose one of: alpaca, chat, llava"
    ):
        load_records({"source": source, "format": "squad"})
    with pytest.raises(DataError, match=r"say which format"):
        load_records(source)
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(DataError, match=r"one\.json: must be a list of objects"):
        load_records({"source": f"json:{tmp_path}/one.json", "format": "qa"})
    for nothing in ("[]", "", "\n"):
        (tmp_path / "none.json").write_text(nothing)
        with pytest.raises(DataError, match=r"none\.json: holds no record"):
            load_records({"source": f"json:{tmp_path}/none.json", "format": "qa"})
    empty = write(tmp_path / "empty.jsonl", [{"question": "?", "answer": []}])
    with pytest.raises(DataError, match="line 1: has an empty answer"):
        load_records({"source": empty, "format": "qa"})


def test_real_files(shared_data):
    def load(name, **options):
        return load_records({"source": f"{name.rpartition('.')[2]}:{shared_data / name}", "format": "qa", **options})  # fmt: skip

    easy = load("easy_vqa_test.parquet")
    assert len(easy) == 9673
    assert easy[0]["image"].size == (64, 64)
    assert {r["answers"][0] for r in easy[:400]} >= {"yes", "no", "circle", "red"}
    assert len(load("nq_open_dev_3610.jsonl")) == 3610
    assert load("triviaqa_3000.jsonl")[1]["answers"][0] == "Antelope"
    assert len(load("webquestions_5810.jsonl", split="trainmodel")[0]["answers"]) == 1
    maths = load(
        "gsm8k_test_1319.jsonl", question="context", answer="{chain_of_thought}\n#### {answer}"
    )
    assert maths[0]["answers"][0].endswith("#### 18")
