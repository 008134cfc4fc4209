"""Of two processes that would write the same place, the second is told who does."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from corda_vlm.errors import CordaError
from corda_vlm.files import entries
from corda_vlm.locks import LockedError, locked, locks


def forked(function):
    """Run `function` in a forked process; returns its pid. It ends without running what pytest does at the end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return child


def status_of(child) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def holding(path, ready, *, inside=False):
    """A child that holds the lock until it is killed."""

    def hold():
        sys.argv = ["corda-vlm", "run", "my config.yaml"]
        with locked(path, inside=inside):
            ready.touch()
            time.sleep(600)

    child = forked(hold)
    wait_for(ready)
    return child


def wait_for(ready):
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline, f"nobody made {ready}"
        time.sleep(0.01)


@pytest.mark.parametrize("inside", [True, False])
def test_the_second_process_is_told_who_holds_it(tmp_path, inside):
    path = tmp_path / "deep" / "out"
    child = holding(path, tmp_path / "ready", inside=inside)
    for _ in range(3):  # a refused process leaves the lock and the note of its holder alone
        with (
            pytest.raises(
                LockedError,
                match=rf"out is being written by process {child} on \w+ \(since 20.*my config",
            ),
            locked(path, inside=inside),
        ):
            pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(path, inside=inside):  # of a dead process: it blocks nobody
        assert entries(path) == []
    assert not path.exists() or not any(path.iterdir())


def test_it_may_be_taken_again_in_the_same_process(tmp_path):
    with locked(tmp_path, inside=True):
        with locked(tmp_path / "." / "x" / "..", inside=True):
            pass
        assert any(tmp_path.iterdir()), "still held"

        def second():
            with pytest.raises(LockedError), locked(tmp_path, inside=True):
                pass

        assert status_of(forked(second)) == 0, "a forked child is another process"
        assert entries(tmp_path) == []
    assert not any(tmp_path.iterdir())


def test_a_second_process_may_wait(tmp_path):
    def briefly():
        with locked(tmp_path / "scores.jsonl"):
            (tmp_path / "ready").touch()
            time.sleep(0.5)

    child = forked(briefly)
    wait_for(tmp_path / "ready")
    with locked(tmp_path / "scores.jsonl", wait=60):
        pass
    assert status_of(child) == 0


def test_no_two_of_many_processes_hold_it_at_once(tmp_path):
    """Each reads a number, and writes one more: where two did so at once, one would be lost."""
    (tmp_path / "number").write_text("0")

    def count():
        for _ in range(20):
            with locked(tmp_path / "x.json", wait=60):
                number = int((tmp_path / "number").read_text())
                time.sleep(0.001)
                (tmp_path / "number").write_text(str(number + 1))

    children = [forked(count) for _ in range(4)]
    assert [status_of(child) for child in children] == [0] * 4
    assert (tmp_path / "number").read_text() == "80"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


def test_a_decorated_function_holds_the_lock_of_its_argument(tmp_path):
    @locks("output", inside=True)
    def write(value: int, *, output=None):
        return value, output is not None and any(output.iterdir())

    assert write(1) == (1, False)
    assert write(2, output=tmp_path / "new") == (2, True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["file/x", "x" * 300, "a\0b", "/proc/corda/x"])
@pytest.mark.parametrize("inside", [True, False])
def test_where_nothing_can_be_written_no_lock_can_be_had(tmp_path, name, inside):
    (tmp_path / "file").touch()
    if name == "x" * 300 and not inside:
        name += "/x"
    with (
        pytest.raises(CordaError, match=r"could not write|no path"),
        locked(tmp_path / name, inside=inside),
    ):
        pass


def test_a_file_system_without_locks_warns_and_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with locked(tmp_path / "x"):
        pass
    assert "has no locks" in caplog.text


def test_where_nobody_can_write_nobody_is_kept_out(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with locked(tmp_path / "finished.safetensors"), locked(tmp_path, inside=True):
        assert not any(tmp_path.iterdir())


def test_a_lock_of_another_user_who_is_dead_is_removed(tmp_path, monkeypatch):
    child = holding(tmp_path / "x", tmp_path / "ready")
    acquire, refused = FileLock.acquire, []

    def refuse(self, *args, **kwargs):
        if Path(self.lock_file).exists():
            refused.append(self)
            raise PermissionError(13, "Permission denied")
        return acquire(self, *args, **kwargs)

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(LockedError, match=f"process {child}"), locked(tmp_path / "x"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path / "x"):
        assert len(refused) == 2
