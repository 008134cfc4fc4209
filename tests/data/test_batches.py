"""Batches: shapes, order, what is kept in memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from corda_vlm.data import load_records, make_batches
from corda_vlm.errors import DataError, UnknownNameError

DIGITS: dict[str, Any] = {"source": "sklearn:digits", "split": "val", "limit": 20}


@pytest.mark.parametrize(
    ("size", "count", "last"), [(1, 20, 1), (7, 3, 6), (20, 1, 20), (64, 1, 20)]
)
def test_images_of_any_batch_size(processor, size, count, last):
    data = load_records(DIGITS)
    loader = make_batches(data, processor, batch_size=size)
    batches = list(loader)
    assert len(loader) == len(batches) == count
    assert set(batches[0]) == {"pixel_values", "labels"}
    assert batches[-1]["pixel_values"].shape == (last, 3, 16, 16)
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == data.labels
    expected = torch.stack([processor.image(record["image"]) for record in data])
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)


def test_texts_alone_and_both(processor, captions):
    data = load_records(f"jsonl:{captions}")
    both = next(iter(make_batches(data, processor, batch_size=7)))
    assert set(both) == {"pixel_values", "input_ids", "attention_mask"}
    assert both["input_ids"].shape == both["attention_mask"].shape
    texts = load_records({"source": f"jsonl:{captions}", "image": None})
    alone = list(make_batches(texts, processor, batch_size=7))
    assert set(alone[0]) == {"input_ids", "attention_mask"}
    assert len(alone[-1]["input_ids"]) == 6
    assert alone[0]["input_ids"][0, :6].tolist() == [ord(letter) % 100 for letter in "a zero"]
    only = next(iter(make_batches(data, processor, batch_size=7, towers="text")))
    assert set(only) == {"input_ids", "attention_mask"}


def test_towers_that_the_data_cannot_feed(processor):
    with pytest.raises(DataError, match="has no texts for the text tower"):
        make_batches(load_records(DIGITS), processor, batch_size=4, towers=["vision", "text"])
    with pytest.raises(UnknownNameError, match="unknown tower"):
        make_batches(load_records(DIGITS), processor, batch_size=4, towers="language")
    with pytest.raises(DataError, match="batch_size is 0"):
        make_batches(load_records(DIGITS), processor, batch_size=0)


def test_order_is_the_seeds(processor):
    data = load_records(DIGITS)

    def order(**options):
        return [
            label
            for batch in make_batches(data, processor, batch_size=6, **options)
            for label in batch["labels"].tolist()
        ]

    assert order() == data.labels
    assert order(shuffle=True, seed=1) == order(shuffle=True, seed=1)
    assert order(shuffle=True, seed=1) != order(shuffle=True, seed=2)
    assert sorted(order(shuffle=True)) == sorted(data.labels)
    assert order(limit=8) == data.labels[:8]


def test_fingerprint_tells_batches_apart(processor):
    data = load_records(DIGITS)
    prints = [
        make_batches(data, processor, **options).fingerprint
        for options in (
            {"batch_size": 4},
            {"batch_size": 5},
            {"batch_size": 4, "shuffle": True},
            {"batch_size": 4, "shuffle": True, "seed": 1},
            {"batch_size": 4, "limit": 10},
        )
    ]
    assert len(set(prints)) == len(prints)
    assert make_batches(load_records(DIGITS), processor, batch_size=4).fingerprint == prints[0]


def _counting(processor):
    seen = []

    def image(picture):
        seen.append(1)
        return processor.image(picture)

    return dataclasses.replace(processor, image=image), seen


def test_small_data_is_preprocessed_once_for_all_loaders(processor):
    data = load_records(DIGITS)
    counting, seen = _counting(processor)
    for _ in range(2):
        for _ in make_batches(data, counting, batch_size=7, shuffle=True):
            pass
    assert len(seen) == 20
    other, again = _counting(processor)  # another processor sees images in another way
    list(make_batches(data, other, batch_size=7))
    assert len(again) == 20


def test_large_data_is_not_kept(processor):
    data = load_records(DIGITS)
    counting, seen = _counting(processor)
    loader = make_batches(data, counting, batch_size=7, cache_mb=0.05)  # 20 images take 60 kB
    list(loader)
    list(loader)
    assert len(seen) == 40


def test_workers_give_the_same_batches(processor):
    data = load_records(DIGITS)
    plain = list(make_batches(data, processor, batch_size=7, cache_mb=0.0))
    threaded = list(make_batches(data, processor, batch_size=7, cache_mb=0.0, workers=3))
    for one, two in zip(plain, threaded, strict=True):
        assert torch.equal(one["pixel_values"], two["pixel_values"])
        assert torch.equal(one["labels"], two["labels"])


def test_bad_pictures_leave_a_batch_smaller(processor, captions):
    (captions.parent / "3.png").write_bytes(b"nothing")
    (captions.parent / "4.png").write_bytes(b"nothing")
    data = load_records({"source": f"jsonl:{captions}", "max_bad_share": 0.2})
    batches = list(make_batches(data, processor, batch_size=5))
    assert [len(batch["pixel_values"]) for batch in batches] == [3, 5, 5, 5]
    assert [len(batch["input_ids"]) for batch in batches] == [3, 5, 5, 5]
    singles = list(make_batches(data, processor, batch_size=1))
    assert len(singles) == 18


def test_images_of_different_sizes_are_named(processor, captions):
    odd = dataclasses.replace(
        processor, image=lambda picture: torch.zeros(3, 16, 16 + picture.getpixel((4, 4))[0] % 2)
    )
    with pytest.raises(DataError, match=r"line \d+: preprocessed to"):
        list(make_batches(load_records(f"jsonl:{captions}"), odd, batch_size=20))
