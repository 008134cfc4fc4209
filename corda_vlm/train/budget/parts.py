"""How the records of a probe are cut: into parts, of which a look takes one, and into batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from corda_vlm.data import BatchLoader, Records, make_batches
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.families.base import Processor
from corda_vlm.train.terms.knowledge import records_of

Parts = Sequence[BatchLoader | Sequence[Mapping[str, Tensor]]]
"""Batches, part by part; each time they are gone through they are the same."""

PART = 128
"""Records of a look while a model trains: the probe is cut into parts of about so many, looked at in turn."""

_TEXTS = 16
"""Conversations that the model is run on at a time."""


def choices_of(batch: Mapping[str, Tensor]) -> int:
    """Among how many the nearest is sought."""
    if "pixel_values" in batch and "input_ids" in batch:
        return len(batch["input_ids"].unique(dim=0))
    return records_of(batch) - 1


def grouped(batches: Iterable[Mapping[str, Tensor]]) -> list[list[Mapping[str, Tensor]]]:
    """Ready batches in parts of at least `PART` records, in their order: fewer would tell too little in a look."""
    parts: list[list[Mapping[str, Tensor]]] = []
    count = PART
    for batch in batches:
        if count >= PART:
            parts.append([])
            count = 0
        parts[-1].append(batch)
        count += records_of(batch)
    if len(parts) > 1 and count < PART:
        parts[-2:] = [parts[-2] + parts[-1]]
    return parts


def batch_sizes(part: BatchLoader | Sequence[Mapping[str, Tensor]]) -> list[int]:
    """Records of each of its batches, as far as they are of use."""
    if isinstance(part, BatchLoader):
        whole, rest = divmod(len(part.indices), part.batch_size)
        return [part.batch_size] * whole + [rest] * (rest > 0)
    return [records_of(batch) for batch in part]


def in_parts(records: Records) -> list[Records]:
    """Parts of at most `PART` records, each with some of everywhere."""
    count = -(-len(records) // PART)
    return [records.select(np.arange(part, len(records), count)) for part in range(count)]


def batches_of(part: Records, processor: Processor, chat: ChatOptions) -> BatchLoader:
    """The batches that a model is run on, which hold a part of records."""
    size = _TEXTS if part.conversational else PART
    return make_batches(part, processor, batch_size=size, chat=chat, must_learn=True)
