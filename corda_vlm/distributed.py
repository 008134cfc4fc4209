"""What the processes of a distributed run have to agree on: each tells it, and all compare."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from corda_vlm.errors import CordaError

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others to come to the same place."""

ROUNDING = 1e-4
"""The share that numbers may differ by which every process has computed by itself."""

_WARN_AFTER = timedelta(seconds=30)
_GOODBYE = timedelta(seconds=10)
_asked: Counter[str] = Counter()
_Made = TypeVar("_Made")


def has_group() -> bool:
    """Can this process talk to others of its run?"""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Processes of this run: those of the process group, or as many as a launcher such as torchrun has announced."""
    if has_group():
        return dist.get_world_size()
    announced = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return int(announced) if announced.isdigit() else 1


def gathered(what: str, text: str) -> list[str]:
    """What every process tells, by rank; all of them have to call this, in the same order.

    It goes through the key-value store of the process group and not through a collective: a process that does not come is
    then an error with its rank in it, on every process that waits, where a collective would hang, or would meet
    another collective of the processes that have gone on.

    Args:
        what: names what is told, for the message.
        told: a short text.

    Raises:
        CordaError: a process did not come within `TIMEOUT`.
    """
    if not has_group() or dist.get_world_size() == 1:
        return [text]
    store: Any = dist.distributed_c10d._get_default_store()
    rank, size = dist.get_rank(), dist.get_world_size()
    _asked[what] += 1
    keys = [f"corda_vlm/{what}/{_asked[what]}/{other}" for other in range(size)]
    store.set(keys[rank], text)
    if not _have_come(store, keys, _WARN_AFTER):
        logger.warning("rank %d waits for the other processes, to compare %s", rank, what)
        if not _have_come(store, keys, TIMEOUT):
            absent = [str(other) for other, key in enumerate(keys) if not store.check([key])]
            raise CordaError(
                f"rank {', '.join(absent)} of {size} did not come to compare {what} within {TIMEOUT.seconds} s. Every process "
                "has to make the same calls; what only one of them needs is better made before the run, in one process"
            )
    texts = [store.get(key).decode() for key in keys]
    store.set(f"{keys[rank]}/read", "1")
    if rank == 0:  # it may be the one that keeps the store, and may end as soon as this returns
        _have_come(store, [f"{key}/read" for key in keys], _GOODBYE)
    return texts


def _have_come(store: Any, keys: list[str], patience: timedelta) -> bool:
    try:
        store.wait(keys, patience)
    except RuntimeError:  # of many kinds, one for each sort of store
        return False
    return True


def same_everywhere(what: str, text: str, remedy: str) -> None:
    """Raise the same error on every process unless all tell the same.

    Raises:
        CordaError: they differ; the message names two ranks and what they told, and ends with `remedy`.
    """
    texts = gathered(what, text)
    if different := [rank for rank, other in enumerate(texts) if other != texts[0]]:
        raise CordaError(
            f"the {len(texts)} processes of this run differ in {what}: {texts[0]} on rank 0, {texts[different[0]]} on rank "
            f"{different[0]}. {remedy}"
        )


def alike_everywhere(what: str, numbers: Sequence[float], remedy: str) -> None:
    """As `same_everywhere`, of numbers that may differ by rounding: to a share of `ROUNDING` each.

    Raises:
        CordaError: they differ; the message names two ranks.
    """
    if not has_group() or dist.get_world_size() == 1:
        return
    found = [json.loads(text) for text in gathered(what, json.dumps(list(numbers)))]
    for rank, other in enumerate(found):
        close = len(other) == len(found[0]) and all(
            math.isclose(a, b, rel_tol=ROUNDING) for a, b in zip(found[0], other, strict=True)
        )
        if not close:
            raise CordaError(
                f"the {len(found)} processes of this run differ in {what}: rank {rank} has others than rank 0. {remedy}"
            )


def made_everywhere(what: str, make: Callable[[], _Made]) -> _Made:
    """`make()`, where an error on one process is an error on all, so that none of them waits for it later.

    Raises:
        CordaError: it failed on another process; the message is that process's.
    """
    if not has_group() or dist.get_world_size() == 1:
        return make()
    try:
        made = make()
    except Exception as error:
        gathered(what, f"{type(error).__name__}: {error}"[:1000] or "an error")
        raise
    for rank, failed in enumerate(gathered(what, "")):
        if failed:
            raise CordaError(f"rank {rank} could not make {what}: {failed}")
    return made
