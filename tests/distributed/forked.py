"""Ranks of one run, forked from a process that has imported everything, over gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

SECONDS = 120.0


def in_ranks(
    size: int, work: Callable[[int], Any], output: Path, *, group: bool = True
) -> list[Any]:
    """What `work(rank)` returns in each of `size` processes; None of one that ended without an answer.

    Args:
        group: make the process group; without, the environment alone tells of it, as a launcher's does.

    Raises:
        RuntimeError: one raised, or took too long.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _be(rank, size, port if group else -port, work, output)
        children.append(child)
    ends = _ends(children)
    errors = [f.read_text() for f in sorted(output.glob("*.error"))]
    if errors or ends != dict.fromkeys(children, 0):
        told = "\n".join(errors) or f"ends: {list(ends.values())}"
        if -signal.SIGKILL not in ends.values() or errors:
            raise RuntimeError(told)
    answers = [output / f"{rank}.json" for rank in range(size)]
    return [json.loads(a.read_text()) if a.exists() else None for a in answers]


def _be(rank: int, size: int, port: int, work: Callable[[int], Any], output: Path) -> None:
    import torch.distributed as dist

    code = 1
    try:
        if size > 1:
            os.environ.update(
                RANK=str(rank),
                WORLD_SIZE=str(size),
                LOCAL_RANK=str(rank),
                LOCAL_WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(abs(port)),
            )
        if size > 1 and port > 0:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        (output / f"{rank}.json").write_text(json.dumps(work(rank)))
        code = 0
    except BaseException:  # whatever it is, the parent says it
        (output / f"{rank}.error").write_text(f"rank {rank} of {size}: {traceback.format_exc()}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ends(children: list[int]) -> dict[int, int]:
    """child -> its exit status, below zero for a signal; those that take too long are killed."""
    ends: dict[int, int] = {}
    until = time.monotonic() + SECONDS
    while len(ends) < len(children):
        for child in children:
            if child not in ends and (found := os.waitpid(child, os.WNOHANG))[0]:
                ends[child] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > until:
            for child in children:
                if child not in ends:
                    os.kill(child, signal.SIGTERM)
        time.sleep(0.02)
    return ends
