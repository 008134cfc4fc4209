"""Conversations, questions and documents of every format become the same kind of records, faults counted."""

from __future__ import annotations

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corda_vlm.data import InstructionData, load_records
from corda_vlm.data.text.documents import pieces as cut_up
from corda_vlm.errors import DataError, UnknownNameError


def write(path, records):
    text = json.dumps(records) if path.suffix == ".json" else "\n".join(map(json.dumps, records))
    path.write_text(text)
    return f"{path.suffix[1:]}:{path}"


@pytest.fixture
def pictures(tmp_path, digits):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.png").write_bytes(digits[index][0])
    return folder


def asks(index, text="<image>\nWhat is it?", answer="A digit.", **more):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": f"r{index}", "image": f"{index}.png", "conversations": turns, **more}


# ------------------------------------------------------------------ conversations


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


# ------------------------------------------------------------------ questions


def test_questions_with_answers_and_aliases(tmp_path):
    source = write(tmp_path / "qa.jsonl", [
        {"question": "Which vegetable?", "answer": "Onion", "aliases": ["Onions", "Onion", "Pyaz"]},
        {"question": "How many?", "answer": 3, "aliases": None},
    ])  # fmt: skip
    first, second = load_records({"source": source, "format": "qa", "question": "Q: {question}"})
    assert first["answers"] == ["Onion", "Onions", "Pyaz"]
    assert first["messages"] == [
        {"role": "user", "content": "Q: Which vegetable?"},
        {"role": "assistant", "content": "Onion"},
    ]
    assert second["answers"] == ["3"]
    only = load_records({"source": source, "format": "qa", "answer": None})
    assert [m["role"] for m in only[0]["messages"]] == ["user"]
    both = load_records({"source": source, "format": "qa", "answer": "{answer}!"})
    assert both[0]["answers"] == ["Onion!"]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"answer": float("nan")}, "has an empty answer"),
        ({"answer": {"x": 1}}, "its answer is a dict, not text"),
        ({"answer": "x", "question": 5}, "its question is an int, not text"),
        ({"answer": "x", "question": float("nan")}, "has an empty question"),
    ],
)
def test_what_is_no_question_or_answer_is_said(tmp_path, record, told):
    source = write(tmp_path / "qa.json", [{"question": "?", **record}])
    with pytest.raises(DataError, match=told):
        load_records({"source": source, "format": "qa"})


def test_the_word_nan_is_an_answer_and_the_number_none(tmp_path):
    rows = [{"question": "Which bread?", "answer": "nan", "answers": ["nan", float("nan"), "naan"]}]
    source = write(tmp_path / "qa.json", rows)
    assert load_records({"source": source, "format": "qa"})[0]["answers"] == ["nan", "naan"]


def test_the_ten_answers_of_vqa_stay_ten(tmp_path):
    people = [{"answer": a, "answer_id": i} for i, a in enumerate(["net"] * 3 + ["racket"] * 7)]
    source = write(tmp_path / "vqa.json", {"info": {}, "annotations": [
        {"question": "What?", "multiple_choice_answer": "racket", "answers": people}]})  # fmt: skip
    record = load_records({"source": source, "format": "qa"})[0]
    assert sorted(record["answers"]) == ["net"] * 3 + ["racket"] * 7
    assert record["answers"][0] == "racket", "the one to learn comes first"


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["a cat", "a dog"], 1, 1),
        (["a cat", "a dog"], "B", 1),
        (["a cat", "a dog"], "a dog", 1),
        ({"text": ["a cat", "a dog"], "label": ["1", "2"]}, "2", 1),
        (["a cat", "a dog"], "C", None),
        (["a cat"], 0, None),
    ],
)
def test_choices(tmp_path, choices, answer, right):
    source = write(tmp_path / "mc.json", [{"question": "?", "choices": choices, "answer": answer}])
    if right is None:
        with pytest.raises(DataError, match="choices"):
            load_records({"source": source, "format": "qa"})
        return
    record = load_records({"source": source, "format": "qa"})[0]
    assert (record["choices"], record["choice"]) == (["a cat", "a dog"], right)
    assert record["answers"] == ["a dog"]


@pytest.mark.parametrize(
    ("cells", "answer", "right"),
    [
        ({"A": "x", "B": "", "C": "y", "D": "z"}, "C", "y"),
        ({"A": "x", "B": None, "C": "nan", "D": "z"}, "D", "z"),
        ({"A": "B", "B": "C", "C": "A", "D": "D"}, "A", "B"),
    ],
)
def test_choices_in_columns_of_their_own_go_by_the_columns_names(tmp_path, cells, answer, right):
    rows = [{"question": "?", "answer": answer, **cells}]
    spec = {"source": write(tmp_path / "mc.json", rows), "format": "qa", "choices": list("ABCD")}
    assert load_records(spec)[0]["answers"] == [right]


def test_lettered_choices_that_are_not_there(tmp_path):
    asked = {"format": "qa", "question": "{question}\n{choices}", "choices": "choices"}
    for stored, why in ((None, "has no choices"), (["?"] * 27, "27 choices, more than there are")):
        rows = [{"question": "Which?", "choices": stored, "answer": 0}]
        with pytest.raises(DataError, match=why):
            load_records({"source": write(tmp_path / "mc.json", rows), **asked})
    rows = [{"question": "Which?", "choices": ["a", "b"], "answer": 0}]
    with pytest.raises(DataError, match="leave answer: null out"):
        load_records({"source": write(tmp_path / "mc.json", rows), **asked, "answer": None})


def test_questions_about_one_picture(tmp_path, digits):
    rows = [{"image": digits[i][0], "name": f"p{i}",
             "qa_json": json.dumps([{"question": f"q{i}{k}", "answer": "yes"} for k in range(3)])}
            for i in range(10)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "qa.parquet")
    spec = {"source": f"parquet:{tmp_path}/qa.parquet", "format": "qa"}
    data = load_records(spec)
    assert len(data) == 30
    assert data[4]["question"] == "q11"
    assert data[4]["name"] == "p1"
    assert data[3]["image"] is data[4]["image"], "decoded once"
    assert data.place(4).endswith("qa.parquet, row 1, question 1")
    splits = {"fit": 0.7, "check": 0.3}
    fit, check = (load_records({**spec, "splits": splits, "split": name}) for name in splits)
    assert (len(fit), len(check)) == (21, 9)
    assert not {r["name"] for r in fit} & {r["name"] for r in check}, "a picture is in one part"
    assert fit.fingerprint != check.fingerprint
    assert load_records(spec).fingerprint == data.fingerprint
    rows[3]["qa_json"] = "nonsense"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "qa.parquet")
    with pytest.raises(DataError, match=r"row 3, question 0: its qa_json holds no list"):
        load_records(spec)


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


# ------------------------------------------------------------------ documents


def test_documents_and_pieces(tmp_path):
    (tmp_path / "a.txt").write_text("one two  three\nfour five")
    (tmp_path / "b.txt").write_text("six")
    whole = load_records({"source": f"text:{tmp_path}/*.txt", "format": "text"})
    assert [r["text"] for r in whole] == ["one two  three\nfour five", "six"]
    assert whole[0]["messages"] is None
    cut = load_records({"source": f"text:{tmp_path}/*.txt", "format": "text", "chunk": 2})
    assert [r["text"] for r in cut] == ["one two  ", "three\nfour ", "five", "six"]
    assert cut.place(1).endswith("a.txt, piece 1")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"b\.txt: its text is no text"):
        load_records({"source": f"text:{tmp_path}/*.txt", "format": "text"})


@given(text=st.text(alphabet=" \nab", max_size=60), words=st.integers(1, 5))
def test_pieces_are_the_document(text, words):
    pieces = list(cut_up(text, words))
    assert "".join(pieces) == text
    assert all(len(piece.split()) <= words for piece in pieces)
    assert all(len(piece.split()) == words for piece in pieces[:-1])


# ------------------------------------------------------------------ real files


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


# ------------------------------------------------------------------ labelled pictures as questions, parts of a file


def test_a_question_about_labelled_pictures(parquet):
    asked = {"format": "qa", "question": "Which digit is this?"}
    data = load_records({"source": "sklearn:digits", "split": "test", "label": "label", **asked})
    plain = load_records({"source": "sklearn:digits", "split": "test"})
    assert data.labels == plain.labels, "cut as for classification"
    for index in (0, 7):
        assert data[index]["question"] == "Which digit is this?"
        assert data[index]["answers"] == [plain.class_names[plain.labels[index]]]
        assert data[index]["image"].tobytes() == plain[index]["image"].tobytes()
    figures = load_records({"source": "sklearn:digits", **asked, "answer": "{label}"})
    assert figures[0]["answers"] == ["0"]
    words = load_records({"source": f"parquet:{parquet}/*.parquet", **asked, "answer": "word"})
    assert words[3]["answers"] == [words[3]["word"]]
    with pytest.raises(UnknownNameError, match=r"question column.*'questoin'"):
        load_records({"source": "sklearn:digits", "format": "qa", "question": "questoin"})


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
