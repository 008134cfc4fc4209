"""Several processes collect covariances together: each runs its share of the batches, and the first writes.

They go on in spans of a few batches each, after each of which all tell each other how far they have come. So a checkpoint is
always of all batches up to one of them, and another number of processes can go on from it; and an error, a stop, or a process
that has died on one of them is known to all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from corda_vlm.covariance.checkpoint import Calibration, Checkpoint, Source
from corda_vlm.covariance.observer import Observer
from corda_vlm.covariance.store import CovarianceStore
from corda_vlm.distributed.agree import (
    has_group,
    made_by_first,
    same_everywhere,
    told_everywhere,
    world_size,
)
from corda_vlm.errors import CordaError
from corda_vlm.families import Batch
from corda_vlm.interrupts import Interrupts
from corda_vlm.progress import Meter
from corda_vlm.sites import model_fingerprint

_SPAN = 2.0
"""Seconds that a span takes, about."""

_MOST = 64
"""Batches of a span, of each process, at most."""


@dataclass(frozen=True)
class _Report:
    """What a process says of itself at the end of a span.

    Attributes:
        reached: the number after its last batch, or the span's start.
        ended: did it come to the end of the batches?
        stop: was it asked to stop?
        write: of the first, is a checkpoint due?
        seconds: a batch took it.
        tokens: it has counted so far.
    """

    reached: int
    ended: bool
    stop: bool
    write: bool
    seconds: float
    tokens: int


def run_together(
    job: Calibration, observer: Observer, checkpoint: Checkpoint, interrupts: Interrupts
) -> None:
    """Run the batches that are left; at the end the first process has all sums.

    Raises:
        CordaError: a process failed, has ended, or does not come; what was written before is whole.
        KeyboardInterrupt: one was asked to stop, once the checkpoint is written.
    """
    start, began, each = observer.batches, time.monotonic(), 1
    remaining = job.batches(start)
    meter = Meter("covariance", job.source.total, unit="batch", initial=start)
    with meter, torch.no_grad():
        while True:
            end = start + each * job.share.size
            reports = _span(job, observer, remaining, start, end, checkpoint, interrupts)
            ended = any(report.ended for report in reports)
            reached = max(report.reached for report in reports) if ended else end
            speed = sum(report.tokens for report in reports) / (time.monotonic() - began)
            meter.update(reached - start, tokens=f"{speed:,.0f}/s")
            stop, start = any(report.stop for report in reports), reached
            if ended:
                observer.pool(reached)
                return
            if stop or reports[0].write:
                observer.pool(reached)
                checkpoint.write()
            if stop:
                raise KeyboardInterrupt(checkpoint.stopped())
            slowest = max(report.seconds for report in reports)
            each = int(min(_MOST, max(1.0, _SPAN / max(slowest, 1e-3))))


def _span(
    job: Calibration,
    observer: Observer,
    remaining: Iterator[tuple[int, Batch | None]],
    start: int,
    end: int,
    checkpoint: Checkpoint,
    interrupts: Interrupts,
) -> list[_Report]:
    """Run the own batches from `start` to before `end`; what all processes say of theirs."""

    def work() -> dict[str, object]:
        own = range(job.share.from_on(start), end, job.share.size)
        reached, ended, began = start, False, time.monotonic()
        for number in own:
            item = next(remaining, None)
            if item is None:
                ended = True
                break
            assert item[0] == number
            job.run(observer, item[1], number)
            reached = number + 1
        total = job.source.total
        seconds = (time.monotonic() - began) / max(1, len(own))
        report = _Report(
            reached,
            ended or (total is not None and end >= total),
            interrupts.asked is not None,
            job.share.is_first and checkpoint.is_due,
            seconds,
            observer.tokens,
        )
        return asdict(report)

    return [_Report(**report) for report in told_everywhere("the batches", work)]


class PooledCheckpoint(Checkpoint):
    """A checkpoint that the first process writes, once it has the sums of all; all processes have to call its `write`."""

    def write(self) -> None:
        made_by_first("the checkpoint", super().write)


def pooled_result(job: Calibration, observer: Observer, *, everywhere: bool) -> CovarianceStore:
    """What all have counted, once they have come to their end: on every process, or on the first for it to write.

    Raises:
        CalibrationError: no batches, or a site that was not reached, or not in every round.
    """

    def check() -> None:
        job.check_batches(observer.batches)
        observer.check_reached()

    made_by_first("the covariances", check)
    if everywhere:
        observer.share_out()
    complete = everywhere or job.share.is_first
    return observer.store(data=job.source.fingerprint, base=job.base, complete=complete)


def check_processes(
    source: Source, model: nn.Module, chosen: Mapping[str, object], path: Path | None
) -> None:
    """Raise `CordaError`, on every process alike, unless all of a distributed run collect the same.

    Args:
        chosen: what else has to be the same, by its name.
        path: that the first writes for all.
    """
    processes = world_size()
    if processes == 1:
        return
    if not has_group():
        raise CordaError(
            f"this is one of {processes} processes, which cannot deal the batches out to each other, as torch.distributed has no "
            "process group yet: call torch.distributed.init_process_group() first. Or calibrate before the run, in one process "
            "(collect_covariance(..., path=...) or `corda-vlm calibrate`), and let every process load the file: "
            "CovarianceStore.load(path)"
        )
    same_everywhere(
        "the calibration batches",
        {"their fingerprint": source.fingerprint, "their number": source.total},
        "Each takes its share by itself: give all of them the same batches in the same order, without a DistributedSampler and not "
        "through accelerate's prepare()",
    )
    same_everywhere(
        "the model",
        {"its fingerprint": model_fingerprint(model)},
        "Load the same weights on all, and do not train before",
    )
    same_everywhere(
        "what is to be collected",
        chosen,
        "Give all of them the same options, sites and store",
    )
    same_everywhere(
        "the path of what is collected",
        {"it": None if path is None else path.absolute()},
        "The first writes for all: give all the same path, on a file system that they share",
    )
    there = "nothing" if path is None or not path.exists() else f"{path.stat().st_size} bytes"
    same_everywhere(
        f"what they see at {path}",
        {"it": there},
        "Give a path on a file system that all of them share",
    )
