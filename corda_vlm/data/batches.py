"""Batches of a data set in a fixed order, the same way for calibration, training and evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from corda_vlm.data.builders import BatchBuilder, batch_builder
from corda_vlm.data.records import Records
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.errors import DataError
from corda_vlm.families.base import Processor


class BatchLoader:
    """Batches of a data set in a fixed order; every iteration gives the same ones.

    Attributes:
        fingerprint: what identifies these batches: the data's own fingerprint, and how they were chosen.
    """

    def __init__(
        self, builder: BatchBuilder, indices: np.ndarray, batch_size: int, chosen_by: str
    ) -> None:
        self.builder, self.indices, self.batch_size = builder, indices, batch_size
        text = f"{builder.data.fingerprint} {','.join(builder.towers)} {batch_size} {chosen_by}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def data(self) -> Records:
        return self.builder.data

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def batch_at(self, number: int) -> dict[str, Tensor]:
        """The batch of this number, from 0; {} if none of its records is of use, which iterating leaves out."""
        start = number * self.batch_size
        return self.builder.batch(self.indices[start : start + self.batch_size])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        empty = True
        for number in range(len(self)):
            batch = self.batch_at(number)
            if batch:
                empty = False
                yield batch
        if empty:
            raise DataError(f"{self.data.spec}: not one record gave a batch")


def make_batches(
    data: Records,
    processor: Processor,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    limit: int | None = None,
    towers: Sequence[str] | str | None = None,
    cache_mb: float = 512.0,
    workers: int = 0,
    chat: ChatOptions | None = None,
    must_learn: bool = False,
) -> BatchLoader:
    """Batches {"pixel_values": (B, 3, H, W), "input_ids": (B, L), "attention_mask": (B, L), "labels": (B,)}.

    A batch holds what the data has and `towers` asks for. The last one may be smaller. For models that generate text
    the batches are those of `ConversationBatches`, with labels (B, L) that are -100 but on the answers.

    Args:
        batch_size: records a batch.
        shuffle: take the records in a random order, the same for the same seed.
        limit: only the first so many records of that order.
        towers, cache_mb, workers: as of `ImageTextBatches`.
        chat, must_learn: as of `ConversationBatches`, for models that generate text.

    Raises:
        DataError: the data lacks what a tower needs, or `batch_size` or `limit` is below 1.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    if not 0 <= seed < 2**32:
        raise DataError(f"seed is {seed}; it must be from 0 to {2**32 - 1}")
    order = np.random.RandomState(seed).permutation(len(data)) if shuffle else np.arange(len(data))
    builder = batch_builder(
        data,
        processor,
        towers=towers,
        cache_mb=cache_mb,
        workers=workers,
        chat=chat,
        must_learn=must_learn,
    )
    chosen_by = f"shuffle={seed if shuffle else None} limit={limit}"
    if builder.options is not None:
        chosen_by += f" {builder.options.identity}"
    return BatchLoader(builder, order[:limit], batch_size, chosen_by)
