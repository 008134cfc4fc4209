"""One second moment of a store: in memory, in a file, or empty; and how it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from corda_vlm.covariance.file import CovarianceFile, Pieces
from corda_vlm.covariance.moments import SecondMoment, triangle_sizes


@runtime_checkable
class Entry(Protocol):
    """One round of one stream, or of the output side of a site: in memory (`SecondMoment`), in a file (`_Stored`), or `Empty`."""

    @property
    def size(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def read(self) -> SecondMoment: ...


@dataclass(frozen=True)
class Empty:
    """One round of one stream that no token has reached."""

    size: int
    count: int = 0
    dtype: torch.dtype = torch.float32

    def read(self) -> SecondMoment:
        return SecondMoment(self.size, self.dtype)


@dataclass(frozen=True)
class _Stored:
    """One round of one stream, in a file."""

    file: CovarianceFile
    prefix: str
    size: int
    count: int
    dtype: torch.dtype

    def read(self) -> SecondMoment:
        moment = SecondMoment(self.size, self.dtype)
        moment.count = self.count
        for means in self.file.pieces(f"{self.prefix}/means", [2]):
            moment.shift.copy_(means[0])
            moment.mean.copy_(means[1])
        moment.fill_triangle(self.file.pieces(f"{self.prefix}/triangle", triangle_sizes(self.size)))
        return moment


class Pooled:
    """One round of several streams together: what stands in for an expert that saw too few tokens."""

    def __init__(self, members: Sequence[Entry]) -> None:
        self._members = members
        self.size, self.dtype = members[0].size, members[0].dtype
        self.count = sum(entry.count for entry in members)
        self._together: SecondMoment | None = None

    def read(self) -> SecondMoment:
        """The rows of all, added up once; one of the members is in memory at a time."""
        if self._together is None:
            self._together = reduce(SecondMoment.merged, (entry.read() for entry in self._members))
        return self._together


def stored(file: CovarianceFile, prefix: str, size: int, count: int) -> Entry:
    if not count:
        return Empty(size)
    dtype, shape = file.dtype_and_shape(f"{prefix}/triangle")
    means = file.dtype_and_shape(f"{prefix}/means")
    if shape != (size * (size + 1) // 2,) or means != (torch.float64, (2, size)):
        raise ValueError(f"{prefix} is not of width {size}")
    return _Stored(file, prefix, size, count, dtype)


def pieces_of(entry: Entry, prefix: str) -> dict[str, Pieces]:
    """The tensors of an entry in a file, made when they are written; none of an empty one."""
    if not entry.count:
        return {}
    length = sum(triangle_sizes(entry.size))
    return {
        f"{prefix}/means": Pieces(torch.float64, (2, entry.size), partial(_means, entry)),
        f"{prefix}/triangle": Pieces(entry.dtype, (length,), partial(_triangle, entry)),
    }


def _means(entry: Entry) -> Iterator[Tensor]:
    moment = entry.read()
    yield torch.stack([moment.shift.double(), moment.mean])


def _triangle(entry: Entry) -> Iterator[Tensor]:
    moment = entry.read()
    yield from moment.triangle()
    moment.release()


def placed(
    entry: Entry, dtype: torch.dtype, device: torch.device | str, scratch: Path | None
) -> SecondMoment:
    """A sum of one's own to add to, of what an entry has."""
    moment = entry.read().to(dtype=dtype, device=device, scratch=scratch)
    moment.release()
    return moment
