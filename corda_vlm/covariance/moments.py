"""Streaming second moments of one input stream: the arithmetic, and nothing about models or files.

Only the upper triangle is computed and kept (half the products, half the memory), in row panels that BLAS
multiplies at full speed. Activations are centered by a fixed shift, the mean of the first rows seen, before they
are multiplied: transformers have channels with large constant values, and without the shift the rounding of those
constants covers exactly the smallest directions that the knowledge-preserved mode reads (in units of the mean
diagonal: 5e-6 without, 7e-10 with the shift, on float32 activations whose smallest eigenvalue is 7e-8). The
second moment about zero is put together again in float64 when it is asked for.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.float32}
"""Name -> dtype of the accumulator. "bf16" multiplies in reduced precision (bfloat16 on a CPU with AMX or
AVX512-BF16, TF32 on CUDA) and adds in float32."""

_BLOCK = 256  # rows a panel: smaller ones save more products, larger ones multiply faster
_CHUNK_BYTES = 24 * 2**20  # of centered activations at a time


class SecondMoment:
    """The running mean of `x xᵀ` over rows `x`, as a packed upper triangle about a shift.

    Attributes:
        size: d, the length of a row.
        count: rows seen, n.
        packed: the mean of `z zᵀ`, `z = x − shift`: the row panels of its upper triangle, one after the other.
        shift: (d,) in the accumulator's dtype; fixed by the first rows.
        mean: (d,) float64, the mean of `z`; small, since the shift is close to the mean of `x`.
    """

    def __init__(
        self,
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scratch: Path | None = None,
    ) -> None:
        """`scratch`: a folder where the triangle lives in a nameless file instead of in memory (CPU only)."""
        self.size, self.count = size, 0
        length = packed_length(size)
        self._file: mmap.mmap | None = None
        if scratch is not None and torch.device(device).type == "cpu":
            self._file = _mapped(length * dtype.itemsize, scratch)
            self.packed = torch.frombuffer(self._file, dtype=dtype)
        else:
            self.packed = torch.zeros(length, dtype=dtype, device=device)
        self.shift = torch.zeros(size, dtype=dtype, device=device)
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    def read(self) -> SecondMoment:
        """Itself; the counterpart in a file has to be read."""
        return self

    def release(self) -> None:
        """Give the memory of a triangle that lives in a file back to the system; nothing is lost.

        Its pages stay where the system caches files, and are read again when they are touched.
        """
        if self._file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)

    @torch.no_grad()
    def add(self, x: Float[Tensor, "n d"], precision: str = "float32") -> None:
        """Count the rows of `x`, on any device and in any float dtype: `C ← C·n/(n+m) + XᵀX/(n+m)`.

        Not safe against exceptions half way (out of memory): the caller has to drop the object then.
        """
        if len(x) == 0:
            return
        if self.count == 0:
            self.shift.copy_(x.mean(0, dtype=torch.promote_types(x.dtype, self.dtype)))
        shift = self.shift.to(x.device)
        most = max(1024, _CHUNK_BYTES // (self.size * self.dtype.itemsize))
        for chunk in x.tensor_split(math.ceil(len(x) / most)):
            z = chunk.to(self.dtype) - shift  # (m, d)
            scale = 1 / (self.count + len(z))
            keep = self.count * scale
            with _products(precision):
                for i, j, panel in self._views():
                    if panel.device == z.device:
                        panel.addmm_(z[:, i:j].T, z[:, i:], beta=keep, alpha=scale)
                    else:
                        product = z[:, i:j].T @ z[:, i:]
                        panel.mul_(keep).add_(product.to(panel.device), alpha=scale)
            self.mean.mul_(keep).add_(z.sum(0).to(self.mean.device, torch.float64), alpha=scale)
            self.count += len(z)

    def matrix(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "d d"]:
        """The mean second moment about zero, exactly symmetric, on the accumulator's device.

        float64 by default, also after float32 accumulation: rounding the finished matrix to float32 would lose
        what the shift gained.
        """
        dense = torch.empty(self.size, self.size, dtype=dtype, device=self.packed.device)
        shift = self.shift.double()
        for i, j, panel in self._views():
            # E[x xᵀ] = E[z zᵀ] + E[z] sᵀ + s E[z]ᵀ + s sᵀ
            part = torch.outer(shift[i:j] + self.mean[i:j], shift[i:])
            part.addr_(shift[i:j], self.mean[i:]).add_(panel)
            upper = part[:, : j - i].triu()
            part[:, : j - i] = upper + upper.triu(1).T
            dense[i:j, i:] = part
            dense[i:, i:j] = part.T
        return dense

    def shifted(self, shift: Float[Tensor, " d"]) -> SecondMoment:
        """The same rows about another shift; loses nothing when the two shifts are close."""
        moved = self.to()
        moved.recenter(shift)
        return moved

    def recenter(self, shift: Float[Tensor, " d"]) -> None:
        """Let this be about another shift, in place; otherwise as `shifted`."""
        delta = self.shift.double() - shift.to(self.shift).double()  # z' = z + delta
        for i, j, panel in self._views():
            change = torch.outer(delta[i:j] + self.mean[i:j], delta[i:])
            panel.add_(change.addr_(delta[i:j], self.mean[i:]).to(panel.dtype))
        self.mean.add_(delta)
        self.shift.copy_(shift)

    def clear(self) -> None:
        """Forget all rows; the first that come fix the shift anew."""
        self.count = 0
        self.packed.zero_()
        self.mean.zero_()
        self.release()

    def merged(self, other: SecondMoment) -> SecondMoment:
        """The rows of both, as one running mean."""
        if self.size != other.size:
            raise ValueError(f"second moments of different sizes: {self.size} and {other.size}")
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        dtype = torch.promote_types(self.dtype, other.dtype)
        both = other.to(dtype=dtype, device=self.packed.device).shifted(self.shift.to(dtype))
        share = self.count / (self.count + other.count)
        both.packed.mul_(1 - share).add_(self.packed, alpha=share)
        both.mean.mul_(1 - share).add_(self.mean, alpha=share)
        both.count = self.count + other.count
        return both

    def to(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        scratch: Path | None = None,
    ) -> SecondMoment:
        """A copy in another dtype, on another device or on disk."""
        copy = SecondMoment(self.size, dtype or self.dtype, device or self.packed.device, scratch)
        copy.count = self.count
        for name in ("packed", "shift", "mean"):
            getattr(copy, name).copy_(getattr(self, name))
        return copy

    def triangle(self) -> Iterator[Float[Tensor, " k"]]:
        """The upper triangle of the mean of `z zᵀ`, row by row as `numpy.triu_indices` lists it, in pieces."""
        for i, j, panel in self._views():
            yield torch.cat([panel[row, row:] for row in range(j - i)])

    def fill_triangle(self, pieces: Iterator[Float[Tensor, " k"]]) -> None:
        """The reverse of `triangle`: pieces of the sizes that `triangle_sizes` gives."""
        for (i, j, panel), piece in zip(self._views(), pieces, strict=True):
            rows = piece.split([self.size - row for row in range(i, j)])
            for row, values in enumerate(rows):
                panel[row, row:] = values
            panel[:, : j - i] += panel[:, : j - i].triu(1).T

    def _views(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, end row, panel (rows, d − first row)) views of `packed`."""
        start = 0
        for i, j, height, width in _panels(self.size):
            yield i, j, self.packed[start : start + height * width].view(height, width)
            start += height * width


def packed_length(size: int) -> int:
    """How many numbers a `SecondMoment` keeps of its triangle: those of its panels."""
    return sum(height * width for _, _, height, width in _panels(size))


def triangle_sizes(size: int) -> list[int]:
    """The lengths of the pieces of `SecondMoment.triangle`; their sum is d(d+1)/2."""
    return [height * width - height * (height - 1) // 2 for _, _, height, width in _panels(size)]


def _panels(size: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, end row, height, width) of the row panels that cover the upper triangle."""
    for i in range(0, size, _BLOCK):
        j = min(i + _BLOCK, size)
        yield i, j, j - i, size - i


def _mapped(nbytes: int, folder: Path) -> mmap.mmap:
    """Zeros in a file without a name, which the system pages in and out and which goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # now, as a disk that is full later means SIGBUS
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            file.truncate(nbytes)
        return mmap.mmap(file.fileno(), nbytes)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Set how float32 products are computed, whatever the caller chose, and put the caller's choice back."""
    fast = precision == "bf16"
    cpu, cuda = getattr(torch.backends.mkldnn, "matmul", None), torch.backends.cuda.matmul
    if cpu is not None and hasattr(cpu, "fp32_precision"):
        # torch >= 2.9, where reading the older setting may raise
        before = cpu.fp32_precision, cuda.fp32_precision
        try:
            cpu.fp32_precision, cuda.fp32_precision = ("bf16", "tf32") if fast else ("ieee", "ieee")
            yield
        finally:
            cpu.fp32_precision, cuda.fp32_precision = before
    else:
        former = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium" if fast else "highest")
            yield
        finally:
            torch.set_float32_matmul_precision(former)
