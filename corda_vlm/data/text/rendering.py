"""Chat templates under limits of time, memory and length: asks the process of `corda_vlm.data.text.sandbox`."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from corda_vlm.errors import CordaError, DataError

SECONDS = 1.0
"""Of processor time for one text. A conversation takes a thousandth of that."""

MEMORY = 1 << 30
"""Bytes that the process may have."""

_WAIT = 20 * SECONDS if hasattr(signal, "setitimer") else 2 * SECONDS
"""By the clock: the limit where the system counts no processor time, else longer, as a busy machine may be slow."""

_START = 60.0
"""Seconds that the process may take to start."""

_LENGTH, _TIMES = 1_000_000, 16
"""Characters of a text: so many, and so many times those of its messages."""

_REMEDY = "choose another chat template (a name such as plain or chatml, or a .jinja file)"


def render(source: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The text that a chat template makes of messages.

    Args:
        source: the template, in Jinja.
        variables: what it may use besides, as JSON has it: special tokens, `add_generation_prompt`.

    Raises:
        DataError: the template does not take these messages.
        CordaError: it is no Jinja, it takes more than `SECONDS` of processor time, fills the memory, calls itself without
            end, or writes more than 1,000,000 characters and 16 times its messages.
    """
    renderer = _RENDERERS.setdefault(os.getpid(), _Renderer())
    given = {"messages": messages, "tools": None, "documents": None, **variables}
    said = renderer.ask(source, given)
    if "text" in said:
        return said["text"]
    kind, detail = said["error"], said["detail"]
    if kind == "refused":
        raise DataError(f"the chat template does not take it ({detail})")
    why = {
        "syntax": f"is no Jinja ({detail})",
        "time": f"ran for more than {SECONDS:g} s",
        "memory": f"filled the memory that a template may have, {MEMORY >> 20:,} MiB",
        "deep": "is nested or calls itself without an end",
        "long": f"wrote more than {detail} characters",
    }.get(kind, f"{kind} (exit code {detail})")
    raise CordaError(f"the chat template {why}; {_REMEDY}")


class _Renderer:
    """One process that renders; threads ask it one after another. It is started when needed, and again if it ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.known: set[str] = set()

    def ask(self, source: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        name = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        given = json.dumps(variables, default=str)
        request = {"name": name, "most": _LENGTH + _TIMES * len(given)}
        with self.lock:
            process = self.process or self._started()
            if name not in self.known:
                request["source"] = source
            try:
                said = _exchange(process, f'{json.dumps(request)[:-1]}, "variables": {given}}}\n')
            except BaseException:  # Ctrl-C: the next one would be given this one's answer
                self.stop()
                raise
            if said is None:
                code = self.stop()
                timed = code == -getattr(signal, "SIGPROF", 0)
                return {"error": "time" if timed else "ended its process", "detail": f"{code}"}
            self.known.add(name)
            return said

    def _started(self) -> subprocess.Popen[bytes]:
        paths = json.dumps([path or str(Path.cwd()) for path in sys.path])
        code = (
            "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); "
            "runpy.run_path(sys.argv[2], run_name='__main__')"
        )
        script = str(Path(__file__).with_name("sandbox.py"))
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code, paths, script, f"{SECONDS}", f"{MEMORY}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            raise CordaError(f"chat templates are rendered in a process of their own, and none can be started: {error}") from error  # fmt: skip
        self.process, self.known = process, set()
        atexit.register(self.stop)
        if _exchange(process, "", _START) is None:
            raise CordaError(f"chat templates are rendered in a process of their own, which ended: exit code {self.stop()}")  # fmt: skip
        return process

    def stop(self) -> int | None:
        """End the process if it has not ended; its exit code."""
        process, self.process = self.process, None
        atexit.unregister(self.stop)
        # That of a process that this one was forked from is not ours to end.
        if process is None or _RENDERERS.get(os.getpid()) is not self:
            return None
        with suppress(OSError):
            _pipe(process.stdin).close()  # at the end of which it ends by itself
        try:
            code = process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        _pipe(process.stdout).close()
        return code


def _exchange(
    process: subprocess.Popen[bytes], line: str, seconds: float = _WAIT
) -> dict[str, Any] | None:
    """Say a line and read the answer; None if the process ended, as it does when it took too long."""
    spoken, heard = _pipe(process.stdin), _pipe(process.stdout)
    with suppress(OSError):  # a pipe that is closed at the other end
        if line:
            spoken.write(line.encode())
            spoken.flush()
        with _ended_after(seconds, process):
            said = heard.readline()
        if said.endswith(b"\n"):
            return json.loads(said)
    return None


@contextmanager
def _ended_after(seconds: float, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the process if it says nothing for so long."""
    if hasattr(select, "poll"):
        events = select.poll()
        events.register(_pipe(process.stdout), select.POLLIN)
        if not events.poll(seconds * 1000):
            process.kill()
        yield
        return
    timer = threading.Timer(seconds, process.kill)  # Windows cannot wait for a pipe
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _pipe(end: IO[bytes] | None) -> IO[bytes]:
    assert end is not None, "asked for when the process was started"
    return end


_RENDERERS: dict[int, _Renderer] = {}
"""By the process that asks: one that was forked has to have its own."""
