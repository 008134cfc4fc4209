"""Stopping in two stages: the first Ctrl-C asks for an orderly end, a second one ends at once."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any


class Interrupts:
    """Ctrl-C and SIGTERM, put off within a `with` block; whoever works there looks at `asked` between two steps.

    Attributes:
        asked: the signal that asked to stop; None until then.
    """

    def __init__(self, doing: str, *, active: bool = True) -> None:
        """
        Args:
            doing: what happens after the first signal, as the user is told, e.g. "finishing this step, then saving".
            active: put signals off at all; without, they do what they always do.
        """
        # Python runs signal handlers, and lets them be set, in the main thread only.
        self._active = active and threading.current_thread() is threading.main_thread()
        self._said = f"\n{doing}; once more to stop at once\n".encode()
        self._former: dict[int, Any] = {}
        self._process = os.getpid()
        self.asked: signal.Signals | None = None

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM) if self._active else ():
            former = signal.getsignal(number)
            # None: a handler that Python did not set and could not put back
            if former not in (None, signal.SIG_IGN):
                self._former[number] = former
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of a DataLoader, forked with this handler
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return  # Ctrl-C is the main process's to handle: it still wants its batch
        if self.asked is not None:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is whole")
        self.asked = signal.Signals(number)
        with suppress(OSError):  # not print: the signal may have come in the middle of one
            os.write(2, self._said)

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
