"""Tensors that are added up over processes, or sent to all of them, many small ones at a time and a large one in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from corda_vlm.distributed.agree import group_size, rank
from corda_vlm.errors import CordaError, first_line

BUCKET = 2**24
"""Numbers that travel at a time: 64 MB of float32."""


def device_of_group() -> torch.device:
    """Where tensors have to be for the processes to exchange them."""
    backends = dist.get_backend_config()  # e.g. "cpu:gloo,cuda:nccl"
    if "nccl" in backends and "cpu" not in backends:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def add_up(tensors: Iterable[Tensor], dtype: torch.dtype, *, everywhere: bool = False) -> None:
    """Add tensors up over all processes; the first has the sums afterwards, in place, and what the others have is spent.

    Args:
        tensors: contiguous, of one dtype, of the same sizes in the same order on each process; taken one after another, so that
            what is made for this alone need not be there at once.
        everywhere: all processes have the sums.

    Raises:
        CordaError: another process has ended.
    """
    if everywhere:
        _in_buckets(tensors, dtype, dist.all_reduce, lambda: True)
    else:
        _in_buckets(tensors, dtype, lambda bucket: dist.reduce(bucket, 0), lambda: rank() == 0)


def send_from(sender: int, tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Give every process what the one of this rank has, in place; otherwise as `add_up`."""
    _in_buckets(
        tensors, dtype, lambda bucket: dist.broadcast(bucket, sender), lambda: rank() != sender
    )


def _in_buckets(
    tensors: Iterable[Tensor],
    dtype: torch.dtype,
    move: Callable[[Tensor], Any],
    receives: Callable[[], bool],
) -> None:
    if group_size() == 1:
        return
    device = device_of_group()
    pieces: list[Tensor] = []
    filled = 0

    def flush() -> None:
        nonlocal filled
        if not pieces:
            return
        bucket = torch.cat([piece.to(device) for piece in pieces])
        with ended_in_words():
            move(bucket)
        if receives():
            for piece, values in zip(pieces, bucket.split([len(p) for p in pieces]), strict=True):
                piece.copy_(values)
        pieces.clear()
        filled = 0

    for tensor in tensors:
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        for piece in tensor.view(-1).split(BUCKET):
            if filled + len(piece) > BUCKET:
                flush()
            pieces.append(piece)
            filled += len(piece)
    flush()


@contextmanager
def ended_in_words() -> Iterator[None]:
    """What a collective says where another process has ended.

    Raises:
        CordaError: in place of the RuntimeError that PyTorch raises.
    """
    try:
        yield
    except RuntimeError as error:
        raise CordaError(
            f"rank {rank()} of {group_size()} could not exchange tensors with the others: one has ended, or does not answer "
            f"({first_line(error)}). Its own message says why; what was written before is whole, and the same command goes on "
            "from there"
        ) from error
