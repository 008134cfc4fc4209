"""Calibration that is stopped, killed or starved of disk goes on without loss."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from corda_vlm.covariance import CovarianceStore, SecondMoment
from corda_vlm.covariance.store import Progress
from corda_vlm.errors import (
    CalibrationError,
    CordaError,
    ForeignFileError,
)
from corda_vlm.locks import LockedError
from corda_vlm.processes import this_process
from tests.covariance import covariance_toy
from tests.covariance.covariance_toy import (
    TOY_SITES,
    Named,
    collect,
    hook_count,
    same,
    toy,
    toy_batches,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*have no full rank")


def test_a_finished_file_is_returned_at_once(tmp_path: Path) -> None:
    model, path = toy(), tmp_path / "c.safetensors"
    batches = Named(toy_batches(3))
    store = collect(model, batches, path=path)
    assert same(store, collect(model, batches))

    class Untouchable(Named):
        def __iter__(self) -> Iterator:
            raise AssertionError("the data was read")

    again = collect(model, Untouchable(batches), path=path)
    assert same(again, store)
    assert again.data_fingerprints == ("calibration-set-1",)
    # a part of the sites is there too
    assert same(collect(model, batches, TOY_SITES, path=path), store)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    model, path, batches = toy(), tmp_path / "c.safetensors", Named(toy_batches(4))
    store = collect(model, batches, TOY_SITES, path=path)
    other = toy_batches(4, seed=2)
    refusals = {
        "of other data": lambda: collect(model, other, TOY_SITES, path=path),
        "rounds=1, now 2": lambda: collect(model, batches, TOY_SITES, path=path, rounds=2),
        "precision='float32', now": lambda: collect(
            model, batches, TOY_SITES, path=path, precision="bf16"
        ),
        "lacks the sites 'head'": lambda: collect(model, batches, path=path),
        "another model": lambda: collect(toy(seed=3), batches, TOY_SITES, path=path),
        "another store": lambda: collect(model, batches, TOY_SITES, path=path, store=store),
    }
    before = path.read_bytes()
    for message, call in refusals.items():
        with pytest.raises(ForeignFileError, match=message):
            call()
    assert path.read_bytes() == before
    (store + store).save(path)
    with pytest.raises(ForeignFileError, match="merged or written by hand"):
        collect(model, batches, TOY_SITES, path=path)


def test_data_without_a_fingerprint_is_known_by_its_first_batch(tmp_path: Path) -> None:
    model, batches = toy(), toy_batches(4)
    for name, make in (("list", lambda b: list(b)), ("iterator", lambda b: iter(b))):
        path = tmp_path / f"{name}.safetensors"
        store = collect(model, make(batches), path=path)
        assert same(collect(model, make(batches), path=path), store)
        with pytest.raises(ForeignFileError, match="of other data"):
            collect(model, make(batches[1:]), path=path)
    with pytest.raises(ForeignFileError, match="of other data"):
        collect(model, batches[:3], path=tmp_path / "list.safetensors")  # fewer of the same


@pytest.mark.parametrize("fails_in", ["a", "c", "head", "between"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_an_exception_in_the_middle_of_a_batch_loses_and_doubles_nothing(
    tmp_path: Path, fails_in: str, rounds: int
) -> None:
    """NaN in one layer of batch 2: streams before it have counted the batch, those after it have not."""
    model, batches, path = toy(), Named(toy_batches(5)), tmp_path / "c.safetensors"
    broken = [True]

    def forward(model: Any, batch: dict) -> None:
        poison = fails_in if broken[0] and batch is batches[2] else ""
        nan = lambda x, where: x * float("nan") if poison == where else x  # noqa: E731
        x = nan(model.embed(batch["input_ids"]), "a")
        h = nan(model.a(x) * model.b(x), "c")
        model.a(x), model.b(x)  # a second call of the same layers
        if poison == "between":
            raise RuntimeError("out of luck")
        y = model.c(h)
        model.head(nan(y, "head")[:, 0])

    options: dict = {"forward": forward, "path": path, "rounds": rounds}
    with pytest.raises((CalibrationError, RuntimeError)):
        collect(model, batches, **options)
    checkpoint = CovarianceStore.load(path, unfinished=True)
    assert checkpoint.progress is not None
    assert checkpoint.progress.batches == 2
    with pytest.raises(ForeignFileError, match="stopped after 2 batches"):
        CovarianceStore.load(path)
    broken[0] = False
    resumed = collect(model, batches, **options)
    assert same(resumed, collect(model, batches, forward=forward, rounds=rounds))
    assert resumed.counts("a") == ([200] if rounds == 1 else [120, 80])


def test_a_sum_left_half_way_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, path = toy(), Named(toy_batches(5)), tmp_path / "c.safetensors"
    add, calls = SecondMoment.add, []

    def out_of_memory(self: SecondMoment, *args: object) -> None:
        calls.append(0)
        add(self, *args)  # type: ignore[arg-type]
        if len(calls) == 8:  # batch 2, the middle stream; the sum has changed and nobody knows
            raise MemoryError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(SecondMoment, "add", out_of_memory)
        with pytest.raises(MemoryError):
            collect(model, batches, path=path, checkpoint_share=1.0)
    progress = CovarianceStore.load(path, unfinished=True).progress
    assert progress == Progress(data="calibration-set-1", batches=2)
    assert same(collect(model, batches, path=path), collect(model, batches))


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches, path = toy(), Named(toy_batches(5)), tmp_path / "c.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def forward(model: nn.Module, batch: dict) -> None:
        if batch is batches[3]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        model(batch["input_ids"])

    try:
        with pytest.raises(CordaError, match=r"could not write .*c\.safetensors"):
            collect(model, batches, forward=forward, path=path, checkpoint_share=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    progress = CovarianceStore.load(path, unfinished=True).progress
    assert progress is not None
    assert progress.batches == 3
    assert list(tmp_path.iterdir()) == [path]
    assert same(collect(model, batches, path=path), collect(model, batches))


def test_checkpoints_are_written_when_cheap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = toy(), Named(toy_batches(20))
    written, now = [], [0.0]
    save = CovarianceStore.save

    def slow_save(self: CovarianceStore, path: Path) -> Path:
        written.append(self.progress.batches)  # type: ignore[union-attr]
        now[0] += 5.0
        return save(self, path)

    def forward(model: nn.Module, batch: dict) -> None:
        now[0] += 10.0
        model(batch["input_ids"])

    monkeypatch.setattr(CovarianceStore, "save", slow_save)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    collect(model, batches, forward=forward, path=tmp_path / "a")
    assert written == [1, 6, 11, 16, 20]  # 5 seconds are a tenth of 50
    written.clear()
    collect(model, batches, forward=forward, path=tmp_path / "b", checkpoint_share=1.0)
    assert written == [*range(1, 21), 20]


def test_leftovers_of_killed_writes_are_swept(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        (tmp_path / f".c.safetensors.0.{this_process()}.partial").write_bytes(b"half")
        os._exit(0)
    os.waitpid(child, 0)
    living = f".other.safetensors.0.{this_process()}.partial"
    (tmp_path / living).write_bytes(b"half")
    collect(toy(), toy_batches(3), path=tmp_path / "c.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == [living, "c.safetensors"]


def test_a_second_process_is_told_who_calibrates(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"

    def forward(model: nn.Module, batch: dict) -> None:
        child = os.fork()
        if child == 0:
            try:
                with pytest.raises(LockedError, match=f"written by process {os.getppid()}"):
                    collect(toy(), toy_batches(3), path=path)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        model(batch["input_ids"])

    collect(toy(), toy_batches(1), path=path, forward=forward)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_ctrl_c_finishes_the_batch_and_saves(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    model, batches, path = toy(), Named(toy_batches(5)), tmp_path / "c.safetensors"
    formers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupted(number: int, times: int) -> object:
        def forward(model: nn.Module, batch: dict) -> None:
            if batch is batches[2]:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            model(batch["input_ids"])

        return forward

    for number in (signal.SIGINT, signal.SIGTERM):
        path.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt, match=r"after 3 of 5 batches.*same command again"):
            collect(model, batches, forward=interrupted(number, 1), path=path)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == formers
        progress = CovarianceStore.load(path, unfinished=True).progress
        assert progress is not None
        assert (progress.batches, progress.ahead) == (3, {})
        assert "finishing the batch in flight" in capfd.readouterr().err
        assert same(collect(model, batches, path=path), collect(model, batches))
    # the second one stops at once: what was written before stays
    path.unlink()
    with pytest.raises(KeyboardInterrupt, match="stopped at once"):
        collect(
            model, batches, forward=interrupted(signal.SIGINT, 2), path=path, checkpoint_share=1.0
        )
    progress = CovarianceStore.load(path, unfinished=True).progress
    assert progress is not None
    assert progress.batches == 2
    assert hook_count(model) == 0
    # without a file there is nothing to finish
    with pytest.raises(KeyboardInterrupt):
        collect(model, batches, forward=interrupted(signal.SIGINT, 1))


def test_data_that_fails_because_of_ctrl_c(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Ctrl-C reaches a DataLoader's workers too; the batch they owed is the only one lost."""
    model, batches, path = toy(), toy_batches(5), tmp_path / "c.safetensors"

    class Loader(Named):
        def __iter__(self) -> Iterator[dict]:
            yield from batches[:2]
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("DataLoader worker exited unexpectedly")

    with pytest.raises(KeyboardInterrupt, match="after 2 of 5 batches"):
        collect(model, Loader(batches), path=path)
    assert same(collect(model, Named(batches), path=path), collect(model, batches))


def test_resuming_a_calibration_that_adds_to_a_store(tmp_path: Path) -> None:
    model, path = toy(), tmp_path / "c.safetensors"
    base, batches = collect(model, toy_batches(2, seed=8)), Named(toy_batches(4))

    def failing(model: nn.Module, batch: dict) -> None:
        if batch is batches[3]:
            raise RuntimeError("stop")
        model(batch["input_ids"])

    with pytest.raises(RuntimeError, match="stop"):
        collect(model, batches, store=base, path=path, forward=failing)
    resumed = collect(model, batches, store=base, path=path)
    assert resumed.counts("a") == [120]
    assert same(resumed, collect(model, batches, store=base))
    assert same(collect(model, batches, store=base, path=path), resumed)


@contextmanager
def child(path: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """This file as a script, calibrating into `path`."""
    process = subprocess.Popen(
        [sys.executable, "-m", covariance_toy.__name__, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


KILLED = {"TOY_SLEEP": "0.05", "TOY_BATCHES": "200"}
"""Ten seconds of work, of which the first batches are waited for: it has not ended, however slow we are to kill it."""


def begun(process: subprocess.Popen, batches: int) -> list[int]:
    """What the child said it had finished before each batch, when it has begun this many more."""
    assert process.stdout is not None
    return [int(process.stdout.readline()) for _ in range(batches)]


def test_kill_at_any_moment_and_go_on(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    seen = 0
    for batches in (6, 3):
        with child(path, **KILLED) as process:
            assert process.stdout is not None
            (began,) = begun(process, 1)  # batches that it starts from
            said = begun(process, batches)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            # what it said it had finished is in the file; at most the batch in flight is missing
            said += [int(line) for line in process.stdout.read().split()]
        progress = CovarianceStore.load(path, unfinished=True).progress
        assert progress is not None
        assert not progress.complete
        assert began == seen
        assert progress.batches >= said[-2]
        assert progress.batches > seen
        seen = progress.batches
    batches = Named(toy_batches(200))
    resumed = collect(toy(), batches, path=path)
    assert same(resumed, collect(toy(), batches))


def test_ctrl_c_of_a_process(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with child(path, **KILLED) as process:
        begun(process, 3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
    assert "Run the same command again" in errors
    progress = CovarianceStore.load(path, unfinished=True).progress
    assert progress is not None
    assert f"stopped after {progress.batches} of 200 batches" in errors


class Slow(list):
    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.05)
            yield batch


def test_progress_shows_tokens_per_second(capfd: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("corda_vlm.progress.EVERY", 0.01)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    collect(toy(), Slow(toy_batches(3)), show_progress=True)
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.match(r"covariance: batch 3 of 3, tokens [\d,]+/s; ", last), last
    collect(toy(), Slow(toy_batches(3)))
    assert capfd.readouterr().err == ""
