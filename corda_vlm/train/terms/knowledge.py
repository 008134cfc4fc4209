"""Records of the knowledge to keep, as the batches that terms of the loss look at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from corda_vlm.data import BatchLoader
from corda_vlm.errors import CordaError, DataError
from corda_vlm.tensors import as_bytes
from corda_vlm.train.steps import StepOrder

Rows = np.ndarray
"""Numbers of records, in the order of the knowledge."""


@runtime_checkable
class Knowledge(Protocol):
    """Batches of the knowledge.

    Attributes:
        fingerprint: of the records, however they are batched.
        identity: what decides which records batch n holds, as JSON.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def identity(self) -> dict[str, Any]: ...

    def at(self, number: int) -> tuple[Rows, dict[str, Tensor]]:
        """Batch `number`, from 0 on, and the records that it is of: every record once, then all again in another order."""
        ...

    def once(self) -> Iterator[tuple[Rows, dict[str, Tensor]]]:
        """Every record that is of use once, in batches."""
        ...

    def keep_only(self, rows: Rows) -> None:
        """Take no other record from now on."""
        ...


Batches = BatchLoader | Sequence[Mapping[str, Tensor]]


def as_knowledge(
    batches: Batches | Knowledge, *, batch_size: int | None = None, seed: int = 0
) -> Knowledge:
    """The knowledge that batches hold.

    Args:
        batches: of `make_batches`, as for `collect_covariance`; or a sequence of batches as the model takes them.
        batch_size: records a step; None for that of `batches`. Ready batches are taken as they are.
        seed: of the order, which is another one in every epoch.

    Raises:
        CordaError: no batches.
    """
    if isinstance(batches, BatchLoader):
        return RecordBatches(batches, batch_size or batches.batch_size, seed)
    if isinstance(batches, Knowledge):
        return batches
    return ReadyBatches(batches, seed)


class RecordBatches:
    """Those of records, which a builder makes."""

    def __init__(self, loader: BatchLoader, batch_size: int, seed: int) -> None:
        self.builder, self.indices = loader.builder, loader.indices
        self._order = StepOrder(len(self.indices), batch_size, seed)
        self._usable: np.ndarray | None = None
        self._chunk = max(batch_size, loader.batch_size)
        said = [loader.data.fingerprint, ",".join(self.builder.towers)]
        if self.builder.options is not None:
            said.append(str(self.builder.options.identity))
        digest = hashlib.sha256(" ".join(said).encode() + self.indices.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        self.identity = {"data": self.fingerprint, "batch_size": batch_size, "seed": seed}

    @property
    def data(self) -> Any:
        return self.builder.data

    def at(self, number: int) -> tuple[Rows, dict[str, Tensor]]:
        for later in range(number, number + 1 + self._order.per_epoch):
            rows = self._order.indices(later)
            if self._usable is not None:
                rows = rows[self._usable[rows]]
            if len(rows) and (batch := self.builder.batch(self.indices[rows])):
                return rows, batch
        raise DataError(f"{self.data.spec}: not one record is of use")

    def once(self) -> Iterator[tuple[Rows, dict[str, Tensor]]]:
        every = np.arange(len(self.indices))
        for start in range(0, len(every), self._chunk):
            rows = every[start : start + self._chunk]
            batch = self.builder.batch(self.indices[rows])
            # which of them are of no use shows when they are decoded
            rows = rows[[int(index) not in self.data.bad for index in self.indices[rows]]]
            if batch:
                yield rows, batch

    def keep_only(self, rows: Rows) -> None:
        self._usable = np.zeros(len(self.indices), dtype=bool)
        self._usable[rows] = True


class ReadyBatches:
    """Those that someone else has made."""

    def __init__(self, batches: Sequence[Mapping[str, Tensor]], seed: int) -> None:
        self._batches = [dict(batch) for batch in batches]
        if not self._batches:
            raise CordaError("the knowledge to keep has no batches: pass at least one")
        sizes = [records_of(batch) for batch in self._batches]
        ends = np.cumsum(sizes)
        self._rows = [np.arange(e - n, e) for e, n in zip(ends, sizes, strict=True)]
        self._order = StepOrder(len(self._batches), 1, seed)
        self.fingerprint = _digest(self._batches)
        self.identity = {"data": self.fingerprint, "seed": seed}

    def at(self, number: int) -> tuple[Rows, dict[str, Tensor]]:
        (chosen,) = self._order.indices(number)
        return self._rows[chosen], self._batches[chosen]

    def once(self) -> Iterator[tuple[Rows, dict[str, Tensor]]]:
        yield from zip(self._rows, self._batches, strict=True)

    def keep_only(self, rows: Rows) -> None:
        """All of them are of use."""


def records_of(batch: Mapping[str, Tensor]) -> int:
    """How many records a ready batch has."""
    for name in ("input_ids", "pixel_values"):
        if name in batch:
            return len(batch[name])
    raise CordaError(
        f"a batch of the knowledge holds {', '.join(batch) or 'nothing'}, and neither input_ids nor pixel_values"
    )


def _digest(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
            digest.update(as_bytes(value))
    return digest.hexdigest()[:16]
