"""The time that all tests together may take, said at the end of each run; conftest.py has the hooks of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

WITH_AMX, WITHOUT = 10, 15
"""Minutes for `make test`'s tests on two cores, with AMX (bfloat16 is quick then) and with AVX2 alone."""

STARTED = pytest.StashKey[float]()


def has_amx() -> bool:
    """Whether oneDNN may use AMX here."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if most.startswith(("SSE", "AVX")) and "AMX" not in most:
        return False
    info = Path("/proc/cpuinfo")
    return info.is_file() and "amx_tile" in info.read_text(encoding="utf-8")


def spent(seconds: float, amx: bool) -> str:
    """What a run took beside what all tests may take."""
    budget = WITH_AMX if amx else WITHOUT
    over = ", which this run is over" if seconds > 60 * budget else ""
    machine = "with AMX" if amx else "without AMX"
    return f"{seconds / 60:.1f} minutes; the budget of all tests on two cores {machine} is {budget}{over}"


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[STARTED] = time.monotonic()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    seconds = time.monotonic() - config.stash.get(STARTED, time.monotonic())
    terminalreporter.write_line(spent(seconds, has_amx()))
