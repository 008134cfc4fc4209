"""A command that torchrun or `accelerate launch` has started several times: read from the environment, before PyTorch is imported."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from corda_vlm.errors import CordaError


def launched() -> tuple[int, int]:
    """(rank, number of processes) as a launcher has announced them; (0, 1) of a process of its own."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return (int(rank), int(size)) if rank.isdigit() and size.isdigit() else (0, 1)


@contextmanager
def in_processes() -> Iterator[None]:
    """A process group for the length of the block, where a launcher has announced several processes; the first alone prints.

    Each takes the accelerator of its place on the machine, if there are so many. Otherwise they exchange tensors on the CPU, and
    their models are where `--device` says: all on the first accelerator, or on the CPU.

    Raises:
        CordaError: the processes do not find each other.
    """
    rank, size = launched()
    if size == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    place = int(os.environ.get("LOCAL_RANK", rank))
    places = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    on_cuda = torch.cuda.is_available() and torch.cuda.device_count() >= places
    if on_cuda:
        torch.cuda.set_device(place)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        raise CordaError(
            f"rank {rank} of {size} does not find the other processes ({str(error).splitlines()[0][:200]}); start them by "
            "torchrun --nproc-per-node N -m corda_vlm …, or without RANK and WORLD_SIZE in the environment"
        ) from error
    try:
        with _said_by_first(rank):
            yield
    finally:
        with suppress(Exception):  # of others that are gone
            dist.destroy_process_group()


@contextmanager
def _said_by_first(rank: int) -> Iterator[None]:
    """Results, notes and warnings are the first's to tell; an error is told by whom it happens to."""
    if rank == 0:
        yield
        return
    logging.getLogger("corda_vlm").setLevel(logging.ERROR)
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def say_error(message: object) -> None:
    """Print what went wrong; of several processes, which one it happened to."""
    rank, size = launched()
    who = "corda-vlm" if size == 1 else f"corda-vlm (rank {rank})"
    print(f"{who}: {message}", file=sys.stderr)


TOGETHER = ("calibrate", "gradient", "plan", "init", "evaluate")
"""The verbs that several processes do together."""


def check_processes(words: Sequence[str]) -> None:
    """Raise `CordaError` where a launcher has started a command several times that one process does.

    Args:
        words: of the command; the first is the verb.
    """
    size = launched()[1]
    if size > 1 and words[:1] and words[0] not in TOGETHER:
        raise CordaError(
            f"started in {size} processes, and {words[0]} runs in one: start it without torchrun or accelerate launch. In several "
            f"processes run {', '.join(TOGETHER[:3])} and {TOGETHER[-1]}; your own script trains in several with DistributedDataParallel, "
            "see the page on several processes"
        )
