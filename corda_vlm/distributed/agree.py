"""What the processes of a distributed run have to agree on: each tells it, and all compare.

All of it goes through the key-value store of the process group and not through a collective: a process that does not come is
then an error with its rank in it, on every process that waits, where a collective would hang, or would meet another
collective of the processes that have gone on.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from corda_vlm import errors
from corda_vlm.distributed.launch import launched
from corda_vlm.errors import CordaError
from corda_vlm.processes import Process, this_process

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others to come to the same place."""

AT_WORK = timedelta(hours=6)
"""The same where the others have work to do first. One of the same machine that has ended is noticed in a few seconds."""

ROUNDING = 1e-4
"""The share that numbers may differ by which every process has computed by itself."""

_WARN_AFTER = timedelta(seconds=30)
_LOOK = timedelta(seconds=1)
_GOODBYE = timedelta(seconds=10)
_asked: Counter[str] = Counter()
_Made = TypeVar("_Made")


def has_group() -> bool:
    """Can this process talk to others of its run?"""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Processes of this run: those of the process group, or as many as a launcher such as torchrun has announced."""
    return dist.get_world_size() if has_group() else launched()[1]


def group_size() -> int:
    """Processes that this one can talk to, itself included."""
    return dist.get_world_size() if has_group() else 1


def rank() -> int:
    """The number of this process among those of its group, from 0."""
    return dist.get_rank() if has_group() else 0


def is_first() -> bool:
    """Is it this process that prints and writes?"""
    return rank() == 0


def gathered(what: str, text: str, patience: timedelta | None = None) -> list[str]:
    """What every process tells, by rank; all of them have to call this, in the same order.

    Args:
        what: names what is told, for the message.
        text: a short text.
        patience: how long others may take to come; None for `TIMEOUT`.

    Raises:
        CordaError: a process did not come in time, has ended, or compares something else.
    """
    size = group_size()
    if size == 1:
        return [text]
    store: Any = dist.distributed_c10d._get_default_store()
    _asked[what] += 1
    keys = [_key(what, _asked[what], other) for other in range(size)]
    try:
        store.set(f"corda_vlm/process/{rank()}", str(this_process()))
        store.set(_place(rank()), json.dumps([what, _asked[what]]))
        store.set(keys[rank()], text)
        _wait(store, keys, what, TIMEOUT if patience is None else patience)
        texts = [store.get(key).decode() for key in keys]
        store.set(f"{keys[rank()]}/read", "1")
    except RuntimeError as error:  # of many kinds, one for each sort of store
        raise CordaError(
            f"rank {rank()} of {size} lost the others while they compared {what}: the process that keeps what they tell each "
            f"other, most often rank 0, has ended ({errors.first_line(error)}). Its own message says why"
        ) from error
    if is_first():  # it may be the one that keeps the store, and may end as soon as this returns
        with suppress(RuntimeError):
            _have_come(store, [f"{key}/read" for key in keys], _GOODBYE)
    return texts


def _key(what: str, number: int, of: int) -> str:
    """Under which a process tells something, for the `number`-th time."""
    return f"corda_vlm/{what}/{number}/{of}"


def _place(of: int) -> str:
    """Under which a process says what it compares, and for which time; null once it has given up."""
    return f"corda_vlm/place/{of}"


def _wait(store: Any, keys: list[str], what: str, patience: timedelta) -> None:
    """Until all have come; raises where one has ended, waits elsewhere for this one, or does not come in time."""
    began, warned = time.monotonic(), False
    while not _have_come(store, keys, min(_LOOK, patience)):
        absent = [other for other, key in enumerate(keys) if not store.check([key])]
        if not absent:  # they have come meanwhile
            return
        passed = time.monotonic() - began
        problem = _problem(store, absent, len(keys), what)
        if problem is None and passed > patience.total_seconds():
            problem = (
                f"rank {_listed(absent)} of {len(keys)} did not come to compare {what} within {patience.total_seconds():.0f} s. "
                f"{_REMEDY}"
            )
        if problem is not None:
            # so that the others find out, too: in the store, which may be this process's
            time.sleep(2 * _LOOK.total_seconds())
            store.set(_place(rank()), "null")  # it waits no more
            raise CordaError(problem)
        if not warned and passed > _WARN_AFTER.total_seconds():
            # where the others have work to do first, waiting is no sign of an error
            expected = patience > TIMEOUT
            logger.log(
                logging.INFO if expected else logging.WARNING,
                "rank %d waits for rank %s, to compare %s%s",
                rank(),
                _listed(absent),
                what,
                "" if expected else f"; at most {patience.total_seconds():.0f} s. {_REMEDY}",
            )
            warned = True


_REMEDY = (
    "Every process has to make the same calls, so leave out an `if rank == 0:` around this one; what only one of them needs is better "
    "made before the run, in one process"
)


def _problem(store: Any, absent: Sequence[int], size: int, what: str) -> str | None:
    """Why some of those who are absent will never come, or None."""
    if gone := [other for other in absent if _is_gone(store, other)]:
        return (
            f"rank {_listed(gone)} of {size} has ended, and did not come to compare {what}. Its own message says why; "
            "what was written before is whole, and the same command goes on from there"
        )
    for other in absent:
        if (elsewhere := _waits_elsewhere(store, other)) is not None:
            return f"rank {rank()} of {size} is to compare {what}, and rank {other} {elsewhere}. {_REMEDY}"
    return None


def _waits_elsewhere(store: Any, other: int) -> str | None:
    """What another process compares that this one has not come to, while this one waits for it: neither goes on by itself."""
    if not store.check([_place(other)]):
        return None
    if (place := json.loads(store.get(_place(other)).decode())) is None:
        return None
    what, number = place
    return None if store.check([_key(what, number, rank())]) else what


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _is_gone(store: Any, other: int) -> bool:
    """Has a process certainly ended? Of one that never told who it is, or of another machine, nothing is certain."""
    key = f"corda_vlm/process/{other}"
    if not store.check([key]):
        return False
    process = Process.parse(store.get(key).decode())
    return process is not None and process.is_gone


def _have_come(store: Any, keys: list[str], patience: timedelta) -> bool:
    # Not the store's own wait, which writes of each time that it waited for nothing.
    pause, until = 0.001, time.monotonic() + patience.total_seconds()
    while not store.check(keys):
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True


def same_everywhere(what: str, parts: Mapping[str, object], remedy: str) -> None:
    """Raise the same error on every process unless all have the same.

    Args:
        parts: what has to be the same, by its name; compared as text.

    Raises:
        CordaError: they differ; the message names the parts that do, two ranks and what these have, and ends with `remedy`.
    """
    told = json.dumps({name: str(part) for name, part in parts.items()})
    every = [json.loads(text) for text in gathered(what, told)]
    for other, own in enumerate(every):
        names = dict.fromkeys([*every[0], *own])
        if differing := [name for name in names if own.get(name) != every[0].get(name)]:
            name = differing[0]
            more = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
            first, second = _where_apart(*(of.get(name, "not given") for of in (every[0], own)))
            raise CordaError(
                f"the {len(every)} processes of this run differ in {what}: {name} is {first} on rank 0, {second} on rank "
                f"{other}{more}. {remedy}"
            )


def _where_apart(one: str, other: str) -> tuple[str, str]:
    """Two different texts in short, from a little before where they begin to differ."""
    pairs = enumerate(zip(one, other, strict=False))
    apart = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    start = apart - 20 if apart > 40 else 0
    return _short(one, start), _short(other, start)


def _short(text: str, start: int) -> str:
    return (
        f"{'…' if start else ''}{text[start : start + 80]}{'…' if len(text) > start + 80 else ''}"
    )


def alike_everywhere(what: str, numbers: Sequence[float], remedy: str) -> None:
    """As `same_everywhere`, of numbers that may differ by rounding: to a share of `ROUNDING` each.

    Raises:
        CordaError: they differ; the message names two ranks.
    """
    if group_size() == 1:
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


def told_everywhere(
    what: str, make: Callable[[], Any], patience: timedelta | None = None
) -> list[Any]:
    """What `make()` gives on every process, by rank: short, and as JSON has it. An error of one is an error of all.

    Raises:
        CordaError: it failed on another process; the message is that process's, and so is the kind where it is one of ours.
    """
    if group_size() == 1:
        return [make()]
    try:
        told = json.dumps({"told": make()})
    except Exception as error:
        failed = {"failed": str(error)[:1000] or "an error", "kind": type(error).__name__}
        gathered(what, json.dumps(failed), patience)
        raise
    texts = [json.loads(text) for text in gathered(what, told, patience)]
    for rank, text in enumerate(texts):
        if "failed" in text:
            raise _error_of(what, rank, **text)
    return [text["told"] for text in texts]


def _error_of(what: str, rank: int, failed: str, kind: str) -> CordaError:
    own = getattr(errors, kind, None)
    ours = isinstance(own, type) and issubclass(own, CordaError)
    if own is None or not ours or own is errors.UnknownNameError:
        own = CordaError
    error = own(f"rank {rank} could not make {what}: {'' if ours else f'{kind}: '}{failed}")
    error.is_relayed = True
    return error


def made_everywhere(
    what: str, make: Callable[[], _Made], patience: timedelta | None = None
) -> _Made:
    """`make()`, where an error on one process is an error on all, so that none of them waits for it later.

    Raises:
        CordaError: as `told_everywhere`.
    """
    made: list[_Made] = []
    told_everywhere(what, lambda: made.append(make()), patience)
    return made[0]


def made_by_first(
    what: str, make: Callable[[], _Made], patience: timedelta | None = None
) -> _Made | None:
    """`make()` on the first process alone, which the others wait for, and for which it is None.

    Raises:
        CordaError: as `told_everywhere`.
    """
    return made_everywhere(what, lambda: make() if is_first() else None, patience or AT_WORK)


def told_by_first(what: str, make: Callable[[], Any], patience: timedelta | None = None) -> Any:
    """What `make()` gives on the first process, as JSON has it, on all.

    Raises:
        CordaError: as `told_everywhere`.
    """
    return told_everywhere(what, lambda: make() if is_first() else None, patience or AT_WORK)[0]
