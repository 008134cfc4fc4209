"""Ctrl-C in two stages."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.synchronize import Event

import pytest

from corda_vlm.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_noted_and_the_second_acts(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="stopped at once"), Interrupts("saving") as stop:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        assert stop.asked is number
        assert capfd.readouterr().err == "\nsaving; once more to stop at once\n"
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_what_is_not_active_leaves_signals_alone() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts("saving", active=False):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts("saving") as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_sets_no_handler() -> None:
    seen = []

    def work() -> None:
        with Interrupts("saving"):
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def _wait_for_a_signal(ready: Event) -> None:
    ready.set()
    while True:  # no `signal.pause`: a signal that comes just before it would be waited for forever
        time.sleep(0.05)


def test_a_forked_worker_ends_at_the_first_sigterm() -> None:
    """A DataLoader ends its workers so; one that only took note of it would be waited for."""
    context = multiprocessing.get_context("fork")
    with Interrupts("saving") as stop:
        ready = context.Event()
        worker = context.Process(target=_wait_for_a_signal, args=(ready,), daemon=True)
        worker.start()
        assert worker.pid is not None
        assert ready.wait(timeout=60)  # Python drops a signal that comes while it forks
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(timeout=60)
        assert worker.exitcode == -signal.SIGTERM
        assert stop.asked is None
