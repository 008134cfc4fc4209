"""What lies in a folder, without what comes and goes with a process."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from corda_vlm.errors import CordaError
from corda_vlm.files.paths import shown

LOCK, HOLDER = ".corda_vlm.lock", ".corda_vlm.holder"
"""Names of a lock and of who holds it (see `corda_vlm.locks`): in a folder as they are, of a file after its name."""


PARTIAL, REPLACED = ".partial", ".replaced"
"""How the names end of what is being written, and of what a new folder replaces."""


def entries(folder: str | Path) -> list[Path]:
    """What lies in a folder, in order, but for partial files and locks, which are nobody's work."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not is_ours_for_now(path.name))


def is_ours_for_now(name: str) -> bool:
    """Is this the name of a partial file or folder, or of a lock? They come and go with a process."""
    return name.startswith(".") and (
        name.endswith((PARTIAL, REPLACED)) or LOCK in name or HOLDER in name
    )


def clear(folder: str | Path, patterns: Iterable[str], *, last: Sequence[str] = ()) -> None:
    """Remove what in a folder matches one of the patterns, those of `last` at the end in this order; locks stay with their holders.

    Raises:
        CordaError: something there cannot be removed.
    """
    order = {name: place for place, name in enumerate(last)}
    try:
        for path in sorted(entries(folder), key=lambda path: order.get(path.name, -1)):
            if not any(fnmatchcase(path.name, pattern) for pattern in patterns):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise CordaError(
            f"could not remove {shown(error.filename or folder)}: {error.strerror}. Remove {shown(folder)} by hand, or "
            "give another folder"
        ) from error
