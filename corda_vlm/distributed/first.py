"""What the first process does for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from corda_vlm.distributed.agree import made_by_first
from corda_vlm.locks import locked


@contextmanager
def locked_by_first(path: str | Path | None) -> Iterator[None]:
    """A path's lock, which the first process holds for all; nothing of None.

    Raises:
        LockedError: another run holds it, said by every process.
    """
    with ExitStack() as stack:
        if path is not None:
            made_by_first(f"the lock of {path}", lambda: stack.enter_context(locked(path)))
        yield
