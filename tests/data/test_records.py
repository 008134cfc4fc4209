"""Selection, labels and texts of records; bad pictures; fingerprints."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corda_vlm.data import load_records
from corda_vlm.data.sources.table import cut, shuffled_within_classes
from corda_vlm.errors import DataError, UnknownNameError

DIGITS: dict[str, Any] = {"source": "sklearn:digits", "split": "train"}


# ------------------------------------------------------------------ selection


def test_limit_is_deterministic_and_nested():
    small, large = (load_records({**DIGITS, "limit": limit, "seed": 3}) for limit in (20, 50))
    assert len(small) == 20
    assert set(small._rows) < set(large._rows)
    again = load_records({**DIGITS, "limit": 20, "seed": 3})
    other = load_records({**DIGITS, "limit": 20, "seed": 4})
    assert again._rows.tolist() == small._rows.tolist()
    assert set(other._rows) != set(small._rows)


def test_per_class_takes_the_same_number_of_each():
    data = load_records({**DIGITS, "per_class": 7, "seed": 1})
    assert np.bincount(data.labels).tolist() == [7] * 10
    assert set(load_records({**DIGITS, "per_class": 3, "seed": 1})._rows) < set(data._rows)
    assert len(load_records({**DIGITS, "per_class": 7, "limit": 30})) == 30


@given(
    labels=st.lists(st.integers(0, 4), min_size=3, max_size=80),
    shares=st.tuples(st.floats(0.1, 0.5), st.floats(0.1, 0.5)),
)
@settings(max_examples=60, deadline=None)
def test_parts_are_disjoint_and_together_no_more_than_all(labels, shares):
    splits = {"a": shares[0], "b": shares[1]}
    parts = [cut(splits, name, labels, len(labels), "x").tolist() for name in splits]
    assert not set(parts[0]) & set(parts[1])
    assert len(parts[0]) + len(parts[1]) <= len(labels)
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - share * len(labels)) <= 1


@given(labels=st.lists(st.integers(0, 3), min_size=8, max_size=200), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_prefix_of_the_order_is_stratified(labels, seed):
    order = shuffled_within_classes(labels, len(labels), seed)
    assert sorted(order) == list(range(len(labels)))
    half = len(labels) // 2
    for label in set(labels):
        taken = sum(labels[i] == label for i in order[:half])
        assert abs(taken - labels.count(label) * half / len(labels)) <= 3


def test_own_splits_of_a_source_without(parquet):
    spec = {
        "source": f"parquet:{parquet}/*.parquet",
        "label": "word",
        "splits": {"fit": 0.5, "check": 0.25},
    }
    fit, check = (load_records({**spec, "split": split}) for split in ("fit", "check"))
    assert (len(fit), len(check)) == (30, 15)
    assert not set(fit._rows) & set(check._rows)
    assert fit.class_names == check.class_names
    with pytest.raises(UnknownNameError, match="choose one of: check, fit"):
        load_records({**spec, "split": "test"})
    with pytest.raises(DataError, match="do not fit 60 records"):
        load_records({**spec, "splits": {"fit": 0.9, "check": 0.2}, "split": "fit"})
    with pytest.raises(DataError, match="do not fit 60 records"):
        load_records({**spec, "splits": {"fit": 50, "check": 20}, "split": "fit"})


def test_a_split_where_there_is_none(captions):
    with pytest.raises(DataError, match="has no split of its own"):
        load_records({"source": f"jsonl:{captions}", "split": "train"})


def test_slices_and_selections():
    data = load_records(DIGITS)
    assert len(data[10:30:2]) == 10
    assert data[10:30:2].labels == data.labels[10:30:2]
    assert data.select([5, 3])[0]["label"] == data.labels[5]
    assert data[-1]["label"] == data.labels[-1]
    with pytest.raises(IndexError):
        data[1000]


# ------------------------------------------------------------------ labels and texts


def test_given_classes_fix_the_order_and_refuse_strangers(parquet, tmp_path):
    spec = {
        "source": f"parquet:{parquet}/*.parquet",
        "label": "word",
        "where": {"word": ["two", "one"]},
    }
    data = load_records({**spec, "classes": ["two", "one", "three"]})
    assert data.class_names == ("two", "one", "three")
    assert {data.labels[i] for i in range(len(data)) if data[i]["word"] == "two"} == {0}
    with pytest.raises(DataError, match=r"row \d+: word 'one' is none of the 1 classes"):
        load_records({**spec, "classes": ["two"]})
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    assert load_records({**spec, "classes": str(tmp_path / "classes.txt")}).class_names == (
        "one",
        "two",
    )
    (tmp_path / "classes.json").write_text('["two", "one"]')
    assert load_records({**spec, "classes": "classes.json"}, beside=tmp_path / "a").class_names == (
        "two",
        "one",
    )


def test_names_are_what_prompts_say(parquet):
    spec = {
        "source": f"parquet:{parquet}/*.parquet",
        "label": "word",
        "where": {"word": ["two", "one"]},
    }
    assert load_records({**spec, "names": {"two": "a pair"}}).class_names == ("one", "a pair")
    assert load_records({**spec, "names": ["I", "II"]}).class_names == ("I", "II")
    with pytest.raises(DataError, match="'ten', which is no class"):
        load_records({**spec, "names": {"ten": "X"}})
    with pytest.raises(DataError, match="1 names for 2 classes"):
        load_records({**spec, "names": ["I"]})


def test_texts_from_a_template(parquet):
    spec = {"source": f"parquet:{parquet}/*.parquet", "label": "word"}
    data = load_records({**spec, "text": "the digit {class_name} ({split})"})
    assert data.texts[1] == "the digit one (train)"
    with pytest.raises(DataError, match=r"cannot be filled in.*'colour'"):
        load_records({**spec, "text": "a {colour} digit"})
    assert load_records({**spec, "text": "tags"}).texts[1] == "digit"


def test_unknown_columns_are_refused(parquet):
    with pytest.raises(
        UnknownNameError, match=r"unknown label column .*'words'.*Did you mean 'word'"
    ):
        load_records({"source": f"parquet:{parquet}/*.parquet", "label": "words"})
    with pytest.raises(DataError, match="neither pictures nor texts"):
        load_records({"source": f"parquet:{parquet}/*.parquet", "image": None})
    with pytest.raises(DataError, match="per_class needs labels"):
        load_records({"source": f"parquet:{parquet}/*.parquet", "label": None, "per_class": 2})


# ------------------------------------------------------------------ bad pictures


def test_bad_pictures_are_skipped_and_counted_up_to_the_share(captions):
    (captions.parent / "3.png").write_bytes(b"not a picture")
    data = load_records({"source": f"jsonl:{captions}", "max_bad_share": 0.05})
    assert sum(1 for _ in data) == 19
    assert data.skipped == 1
    assert sum(1 for _ in data) == 19  # found before: not counted again
    with pytest.raises(
        DataError, match=r"captions\.jsonl, line 4: no image that can be decoded: 3\.png \(Unid"
    ):
        data[3]
    (captions.parent / "7.png").unlink()
    with pytest.raises(
        DataError, match=r"2 of 20 images do not decode.*\n.*line 4: .*\n.*line 8: .*7\.png"
    ):
        list(data)


def test_one_bad_picture_of_few_is_an_error_by_default(captions):
    (captions.parent / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 20 images do not decode, more than the 0.01"):
        list(load_records(f"jsonl:{captions}"))


# ------------------------------------------------------------------ fingerprints


def test_fingerprint_is_of_the_content_not_of_the_place(captions, tmp_path):
    first = load_records(f"jsonl:{captions}").fingerprint
    shutil.copytree(captions.parent, tmp_path / "moved")
    moved = load_records(f"jsonl:{tmp_path / 'moved' / 'captions.jsonl'}")
    assert moved.fingerprint == first
    shutil.copy(captions.parent / "5.png", tmp_path / "moved" / "0.png")
    assert load_records(f"jsonl:{tmp_path / 'moved' / 'captions.jsonl'}").fingerprint != first


def test_fingerprint_sees_selection_and_order():
    prints = [
        load_records(spec).fingerprint
        for spec in (
            DIGITS,
            {**DIGITS, "split": "test"},
            {**DIGITS, "limit": 50},
            {**DIGITS, "limit": 50, "seed": 1},
            {**DIGITS, "text": "a {class_name}"},
        )
    ]
    assert len(set(prints)) == len(prints)
    data = load_records({**DIGITS, "limit": 50})
    assert data[::-1].fingerprint != data.fingerprint
    assert data[:].fingerprint == data.fingerprint
