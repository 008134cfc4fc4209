"""Processes, told apart across hosts and after their end: who wrote a partial file, who holds a lock."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_FORM = re.compile(r"(?P<host>[A-Za-z0-9_]{1,41})-(?P<pid>\d{1,10})-(?P<start>\d{1,20})")


@dataclass(frozen=True)
class Process:
    """A process that runs or once ran. Its number alone may have been given to another since.

    Attributes:
        host: name of the machine (or container) whose process it is, in letters, digits and underscores, with a hash
            behind it that tells apart those of one name. It changes with every start of the machine or container.
        pid: its number there.
        start: when it began, in a unit of the system's.
    """

    host: str
    pid: int
    start: int

    def __str__(self) -> str:
        return f"{self.host}-{self.pid}-{self.start}"

    @classmethod
    def parse(cls, text: str) -> Process | None:
        """The process that `str` gave `text`; None if it is of another form."""
        if (match := _FORM.fullmatch(text)) is None:
            return None
        return cls(match["host"], int(match["pid"]), int(match["start"]))

    @property
    def is_gone(self) -> bool:
        """Has it certainly ended? Of another host's nothing is certain."""
        return self.host == _host() and _start(self.pid) != self.start


def this_process() -> Process:
    """The calling process; a forked child is another than its parent."""
    pid = os.getpid()
    return Process(_host(), pid, _start(pid) or 0)


@functools.cache
def _host() -> str:
    name, boot, numbering = socket.gethostname(), "", ""
    # Machines may share a name (localhost), and containers of one machine a name without sharing the numbers of
    # their processes. Systems without /proc have neither of these.
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    with suppress(OSError):
        numbering = str(Path("/proc/self/ns/pid").readlink())
    readable = re.sub(r"[^A-Za-z0-9_]", "_", name)[:32] or "unnamed"
    return f"{readable}_{hashlib.sha256(repr((name, boot, numbering)).encode()).hexdigest()[:8]}"


def _start(pid: int) -> int | None:
    """When the process began, None if there is none of that number; a zombie has ended."""
    with suppress(OSError, IndexError, ValueError):
        # Ticks since the machine's start: unlike a time of day they do not move when the clock is set.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *numbers = fields.rpartition(")")[2].split()
        return None if state in "ZX" else int(numbers[18])
    import psutil  # where there is no /proc

    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return int(process.create_time() * 1000)
    return None
