"""Locks: of two processes that would write the same folder or file, the second is told who does.

The system lets go of a lock when its holder ends, however it ends, so that a dead process blocks nobody.
"""

from __future__ import annotations

import errno
import functools
import inspect
import json
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from corda_vlm.errors import CordaError
from corda_vlm.files import HOLDER, LOCK, cannot_write, check_path, shown
from corda_vlm.processes import Process, this_process

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

ORPHANS = 10.0
"""Seconds to wait where the holder is dead: workers of its may hold the lock until they notice."""

NAMELESS = 2.0
"""Seconds to wait for a holder that has not said yet who it is: it took the lock only just now."""

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockedError(CordaError):
    """Another process writes there; the message says which."""


@dataclass
class _Held:
    lock: FileLock | None  # None where the file system has no locks
    process: int
    times: int = 1


_held: dict[Path, _Held] = {}
_guard = threading.RLock()


@contextmanager
def locked(path: str | Path, *, inside: bool = False, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of a file or folder for the time of the block; again within the same process is free.

    Args:
        path: what is going to be written; it need not exist.
        inside: `path` is a folder that is written into: it is made if it is not there, and the lock lies in it. Without,
            the lock lies beside `path`, as it must where `path` as a whole is replaced.
        wait: seconds to wait for another holder.

    Raises:
        LockedError: another process holds it still; names process, host, command and since when.
        CordaError: nothing can be written there.
    """
    path = check_path(path)
    made = _make(path if inside else path.parent, path)
    place = _place(path, inside)
    _take(place, path, wait)
    try:
        yield
    finally:
        _let_go(place)
        for folder in made:
            with suppress(OSError):  # what was written lies in it
                folder.rmdir()


def locks(argument: str, *, inside: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function that writes to the path it is given as `argument`, None for nothing: it holds the lock."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            path: Any = bound.arguments[argument]
            if path is None:
                return function(*args, **kwargs)
            with locked(path, inside=inside):
                return function(*args, **kwargs)

        return call

    return decorate


# ------------------------------------------------------------------ taking and letting go


def _make(folder: Path, path: Path) -> list[Path]:
    """Make `folder`; returns what was made for it, the innermost first."""
    made: list[Path] = []
    try:
        while not folder.exists():
            made.append(folder)
            folder = folder.parent
        for one in reversed(made):
            one.mkdir(exist_ok=True)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
    except OSError as error:
        raise cannot_write(path, error) from error
    return made


def _place(path: Path, inside: bool) -> Path:
    """Where the lock lies, the same for every way to write the path."""
    if inside:
        return Path(os.path.realpath(path)) / LOCK
    real = Path(os.path.realpath(path))
    # Of long names the beginning has to do: the system bounds their length.
    return real.with_name(f".{real.name.encode()[:150].decode(errors='ignore')}{LOCK}")


def _take(place: Path, path: Path, wait: float) -> None:
    began = time.monotonic()
    while not _taken(place, path):
        who = _read(place)
        process = Process.parse(str(who.get("process")))
        if time.monotonic() - began >= max(wait, _patience(process)):
            raise LockedError(_refusal(path, who))
        time.sleep(0.05)


def _patience(holder: Process | None) -> float:
    """Seconds to wait for a lock in any case."""
    if holder is None:
        return NAMELESS
    return ORPHANS if holder.is_gone else 0.0


def _taken(place: Path, path: Path) -> bool:
    with _guard:
        held = _held.get(place)
        if held is not None and held.process == os.getpid():
            held.times += 1
            return True
        lock = FileLock(place)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            lock = None
            number = error.errno if isinstance(error, OSError) else errno.ENOSYS
            if number in _NO_LOCKS:
                logger.warning(
                    "%s: this file system has no locks; let no other process write there", path
                )
            elif number not in _NOT_WRITABLE:
                raise cannot_write(path, error) from error
            elif number != errno.EROFS and os.access(place.parent, os.W_OK):
                return _left_by_another_user(place)
            # Where nobody can write, nobody need be kept from it; what is finished can still be read.
        _held[place] = _Held(lock, os.getpid())
        if lock is None:
            return True
        with suppress(OSError):  # a full disk: what is going to be written will say so
            _holder(place).write_text(json.dumps(_about_this()), encoding="utf-8")
        return True


def _left_by_another_user(place: Path) -> bool:
    """A lock file that this user may not open: removed if its holder is dead. Returns False, for not taken yet."""
    process = Process.parse(str(_read(place).get("process")))
    if process is not None and process.is_gone:
        with suppress(OSError):
            place.unlink()
    return False


def _let_go(place: Path) -> None:
    with _guard:
        held = _held[place]
        held.times -= 1
        if held.times or held.process != os.getpid():
            return
        del _held[place]
        if held.lock is None:
            return
        # Removed while it is held: whoever has opened it by now finds it gone, and makes another.
        for file in (_holder(place), place):
            with suppress(OSError):
                file.unlink()
        held.lock.release()


# ------------------------------------------------------------------ who holds it


def _holder(place: Path) -> Path:
    """Beside the lock, as some systems and versions of filelock let nobody else read in it."""
    return place.with_name(place.name.removesuffix(LOCK) + HOLDER)


def _about_this() -> dict[str, str]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "python"
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"process": str(this_process()), "since": since, "command": command[:300]}


def _read(place: Path) -> dict[str, Any]:
    """What the holder wrote about itself; empty if it has not yet."""
    with suppress(OSError, ValueError):
        who = json.loads(_holder(place).read_text(encoding="utf-8"))
        return who if isinstance(who, dict) else {}
    return {}


def _refusal(path: Path, who: dict[str, Any]) -> str:
    process = Process.parse(str(who.get("process")))
    if process is None:
        by = "another process"
    else:
        by = f"process {process.pid} on {process.host} (since {who.get('since')}: {shown(str(who.get('command')))})"
    return f"{shown(path)} is being written by {by}; wait until it has ended, or stop it, or give another path"
