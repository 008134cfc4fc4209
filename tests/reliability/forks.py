"""Children of one warmed-up process: each runs one thing, is killed where it is told, and says how it ended."""

from __future__ import annotations

import builtins
import io
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 90
MEMORY = 16 << 30
LONGEST = 2000
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


@dataclass(frozen=True)
class End:
    """How a child ended.

    Attributes:
        kind: "ok", "refused" (a `CordaError`, or status 2 with a message), "raw" (any other exception), "stopped"
            (another status), "killed" or "hung".
        told: the message, or of a raw exception its type and text.
        place: of a raw exception: the innermost line of the package it passed through.
        events: what it did to the file system, where that was watched.
        value: what the function returned, if JSON can say it.
    """

    kind: str
    told: str = ""
    place: str = ""
    events: list[str] = field(default_factory=list)
    value: Any = None


def run(
    function: Callable[[], Any],
    *,
    folder: Path,
    log: Path | None = None,
    watch: bool = False,
    kill_at: int | None = None,
) -> End:
    """Run `function` in a forked child whose working folder is `folder`.

    Args:
        log: gets what it prints.
        watch: note its file system events below `folder`'s parent.
        kill_at: die before the event of this number.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _live(function, folder, log, writing, watch or kill_at is not None, kill_at)
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123 - a descriptor
        content = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM:
        return End("hung", f"ran for more than {SECONDS} s")
    if status < 0:
        return End("killed" if kill_at is not None else "raw", f"signal {-status}", "a signal")
    return End(**json.loads(content))


def _live(
    function: Callable[[], Any],
    folder: Path,
    log: Path | None,
    writing: int,
    watch: bool,
    kill_at: int | None,
) -> None:
    """The whole life of a child; never returns."""
    end = End("raw", "ended without a word")
    events: list[str] = []
    try:
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # /dev/zero has no end
        os.chdir(folder)
        out = os.open(os.devnull if log is None else log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = open(1, "w", closefd=False, errors="replace")  # noqa: SIM115
        said = sys.stderr = io.StringIO()
        if watch:
            _watch(events, folder.parent, kill_at)
        end = _ended(function, said)
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            answer = {**end.__dict__, "events": list(events)}
            os.set_blocking(writing, True)
            with open(writing, "wb") as pipe:
                pipe.write(json.dumps(answer, default=str).encode())
        os._exit(0)


def _ended(function: Callable[[], Any], said: io.StringIO) -> End:
    from corda_vlm.errors import CordaError

    try:
        return End("ok", value=function())
    except CordaError as error:
        return _refused(str(error))
    except SystemExit as stop:
        if stop.code in (None, 0):
            return End("ok")
        return _refused(said.getvalue()) if stop.code == 2 else End("stopped", f"{stop.code}")
    except BaseException as error:
        inner = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if "/corda_vlm/" in frame.filename
        ]
        place = "outside of the package"
        if inner:
            name = inner[-1].filename.rpartition("/corda_vlm/")[2]
            place = f"{name}:{inner[-1].lineno} {inner[-1].name}"
        text = str(error)[:300] if not isinstance(error, KeyError) else repr(error)
        return End("raw", f"{type(error).__name__}: {text}", place)


def _refused(message: str) -> End:
    lines = [line for line in message.strip().splitlines() if "warning" not in line]
    told = "\n".join(lines)
    if "Traceback (most recent" in told:
        return End("raw", told[-300:], "a printed traceback")
    if len(told) > LONGEST:
        return End("raw", f"a message of {len(told):,} characters: {told[:200]}", "a long message")
    return End("refused", told[:600])


# ------------------------------------------------------------------ killing


def _watch(events: list[str], root: Path, kill_at: int | None) -> None:
    """Note what happens to files below `root`, and die before the event `kill_at`.

    A write in Python is an event of its own: the victim dies with half of it on the disk.
    """
    inside = str(root)

    def concerns(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return False
        text = os.fsdecode(path)
        return not text.startswith("/") or text.startswith(inside)

    def event(what: str) -> bool:
        """True if the process is to die here."""
        events.append(what)
        return len(events) - 1 == kill_at

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def name(path: Any) -> str:
        return os.fsdecode(path).rpartition("/")[2]

    def hook(kind: str, args: tuple[Any, ...]) -> None:
        if kind == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & _WRITES or not concerns(path):
                return
            if event(f"open {name(path)}"):
                die()
        elif kind in _EVENTS and concerns(args[0]) and event(f"{kind[3:]} {name(args[0])}"):
            die()

    class Torn:
        """A file whose first write puts half of its bytes on the disk, and kills."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: Any) -> None:
            self._file.write(data[: len(data) // 2])
            self.close()

        def close(self) -> None:
            self._file.flush()
            die()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *_: Any) -> None:
            self.close()

    opened, wrote = io.open, os.write

    def open_torn(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        made = opened(file, mode, *args, **kwargs)
        if set(mode) & set("wax+") and concerns(file) and event(f"write {name(file)}"):
            return Torn(made)
        return made

    def write_torn(descriptor: int, data: bytes) -> int:
        if descriptor > 2 and event("os.write"):
            wrote(descriptor, data[: len(data) // 2])
            die()
        return wrote(descriptor, data)

    io.open = builtins.open = open_torn  # type: ignore[assignment]
    os.write = write_torn  # type: ignore[assignment]
    sys.addaudithook(hook)
