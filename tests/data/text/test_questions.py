"""Questions with their answers, aliases and choices, one or several about a picture."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corda_vlm.data import load_records
from corda_vlm.errors import DataError, UnknownNameError
from tests.data.text.written import write


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
