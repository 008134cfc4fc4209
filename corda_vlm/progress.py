"""What long work says while it runs: a bar on a terminal, a line every half minute in a log.

Both go to the standard error, and neither appears with `TQDM_DISABLE` set, under `showing(False)` or after `be_quiet()`.
A line in a log comes from a thread of its own, so that it is there also while a single step takes minutes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

EVERY = 30.0
"""Seconds between two lines in a log. What takes less says nothing there."""

_shown: ContextVar[bool] = ContextVar("shown", default=True)
_innermost: ContextVar[Meter | None] = ContextVar("innermost", default=None)
_quiet = False


def be_quiet(quiet: bool = True) -> None:
    """From here on in this process neither progress nor notes are shown."""
    global _quiet
    _quiet = quiet


@contextmanager
def showing(show: bool) -> Iterator[None]:
    """Within the block progress is shown only if `show` is true, and if it is shown outside of the block too."""
    before = _shown.set(_shown.get() and show)
    try:
        yield
    finally:
        _shown.reset(before)


def note(text: str) -> None:
    """Print how far a long verb is, one line, unless the user asked for quiet."""
    if not _quiet:
        _write(sys.stdout, text)


class Meter:
    """How far one piece of work is. Close it, or use it as a context manager.

    Attributes:
        done: units done so far, those of an earlier run included.
        facts: what else is told, e.g. {"loss": "0.31"}.
    """

    def __init__(
        self,
        what: str,
        total: float | None = None,
        *,
        unit: str = "step",
        initial: float = 0,
        bar: bool = True,
    ) -> None:
        """
        Args:
            what: the work, e.g. "training".
            total: units in all, for the time left; None where that is not known.
            unit: what is counted, in the singular.
            initial: units that an earlier run did.
            bar: draw a bar on a terminal; what has no steps of its own is only told of in logs.
        """
        self.what, self.total, self.unit = what, total, unit
        self.done, self._initial = initial, initial
        self.facts: dict[str, str] = {}
        self._began = time.monotonic()
        self._bar: Any = None
        self._closed = threading.Event()
        self._speaker: threading.Thread | None = None
        self._said, self._inner, self._steps = False, 0, bar
        self._outer = _innermost.get()
        if self._outer is not None:
            self._outer._inner += 1
        _innermost.set(self)
        if _quiet or not _shown.get() or _disabled():
            return
        if _on_a_screen():
            if not bar:
                return
            from tqdm.auto import tqdm

            self._bar = tqdm(
                desc=what,
                total=total,
                initial=initial,
                unit=unit,
                leave=False,  # what was done is said in a line of its own
                mininterval=0.5,
                dynamic_ncols=True,
            )
        else:
            self._speaker = threading.Thread(target=self._speak, daemon=True)
            self._speaker.start()

    def update(self, n: float = 1, **facts: str) -> None:
        """`n` more units are done; `facts` are told from now on."""
        self.done += n
        self.facts.update(facts)
        if self._bar is not None:
            if facts:
                self._bar.set_postfix(self.facts, refresh=False)
            self._bar.update(n)

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        if self._speaker is not None:
            self._speaker.join(1.0)  # what it was about to say comes before what is said next
        if self._outer is not None:
            self._outer._inner -= 1
        if _innermost.get() is self:
            _innermost.set(self._outer)
        if self._bar is not None:
            self._bar.close()
        elif self._said and self._steps:
            self._say()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        """The line of a log, e.g. "training: step 82 of 100, loss 0.31; 95 s so far, 20 s left"."""
        passed = time.monotonic() - self._began
        parts = []
        if self.total is not None:
            parts.append(f"{self.unit} {self.done:,.0f} of {self.total:,.0f}")
        elif self.done:
            parts.append(f"{self.done:,.0f} {self.unit}s")
        parts += [f"{name} {value}" for name, value in self.facts.items()]
        told = f"{_duration(passed)} so far"
        fresh = self.done - self._initial
        if self.total is not None and fresh > 0:
            told += f", {_duration(passed / fresh * max(0.0, self.total - self.done))} left"
        return f"{self.what}: {'; '.join(part for part in (', '.join(parts), told) if part)}"

    def _speak(self) -> None:
        while not self._closed.wait(EVERY):
            if not self._inner:  # else the work within speaks
                self._say()

    def _say(self) -> None:
        self._said = True
        _write(sys.stderr, str(self))


def advance(n: float = 1) -> None:
    """`n` more units of the innermost work that is under way are done, if there is such a work."""
    if (innermost := _innermost.get()) is not None:
        innermost.update(n)


def track(items: Iterable[T], what: str, *, unit: str) -> Iterator[T]:
    """The items, one after another, as a piece of work."""
    total = len(items) if isinstance(items, Sized) else None
    with Meter(what, total, unit=unit) as meter:
        for item in items:
            yield item
            meter.update()


def _write(stream: Any, line: str) -> None:
    """Write a line in one call, so that lines of other threads do not mix in."""
    with suppress(OSError, ValueError):  # a log on a full disk, or closed: the work matters more
        stream.write(f"{line}\n")
        stream.flush()


def _disabled() -> bool:
    """Did the user turn tqdm's bars off? As tqdm itself reads the variable: any text but none."""
    return bool(os.environ.get("TQDM_DISABLE"))


def _on_a_screen() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
