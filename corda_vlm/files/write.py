"""Writes that leave either the old file or folder, or the new one in full."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from corda_vlm.errors import CordaError
from corda_vlm.files.folder import PARTIAL, REPLACED
from corda_vlm.files.paths import check_path, shown
from corda_vlm.processes import Process, this_process

_NUMBERS = itertools.count()


def sweep(folder: str | Path) -> None:
    """Remove the partial files and folders in `folder` whose writers have ended, killed half way.

    Those of living processes stay, and those of other hosts, of which nothing is known here.
    """
    with suppress(OSError), os.scandir(folder) as listing:
        for entry in listing:
            if not entry.name.endswith(PARTIAL):
                continue
            writer = Process.parse(entry.name.removesuffix(PARTIAL).rpartition(".")[2])
            if writer is not None and writer.is_gone:
                _remove(Path(entry.path))


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there and can be; never raises, as it runs while errors pass through."""
    with suppress(OSError, ValueError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """A name beside `path` that says whose it is and that no other write has at this time."""
    # Cut, as a name is at most 255 bytes long on most systems.
    stem = path.name.encode()[:120].decode(errors="ignore")
    return path.with_name(f".{stem}.{next(_NUMBERS)}.{this_process()}{PARTIAL}")


def _target(path: str | Path) -> Path:
    """Where a write to `path` goes, its folder made; what dead writers left there is gone.

    Raises:
        CordaError: no file can be written there.
    """
    path = check_path(path)
    try:
        # Through a link to the file it names, which else would be replaced by the new one.
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    sweep(path.parent)
    return path


def cannot_write(path: str | Path, error: Exception) -> CordaError:
    """What went wrong in writing `path`, and what to do about it."""
    # Some libraries raise errors of their own, with the system's reason in the text alone.
    number = error.errno if isinstance(error, OSError) else None
    message = str(error).lower()
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    if number in (errno.ENOTDIR, errno.EEXIST):
        above = next((p for p in Path(path).parents if p.exists() and not p.is_dir()), None)
        if above is not None:
            reason = f"{shown(above)} is a file, not a folder"
        remedy = "name a path whose folders are folders"
    elif number == errno.EISDIR:
        reason, remedy = "it is a folder", "name a file"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS) or "denied" in message:
        remedy = "choose a folder that you may write to"
    elif number == errno.ENAMETOOLONG:
        remedy = "choose a shorter name"
    elif number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in message:
        remedy = "free some space or choose another folder, then run the same command again"
    else:
        remedy = "choose another place, then run the same command again"
    return CordaError(
        f"could not write {shown(path)}: {reason}. What was there before, if anything, is untouched; {remedy}."
    )


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it onto `path` only when the block ends well.

    A reader, or a process killed at any moment, sees the old file or the new one, never a part.
    The partial file is removed when the block raises (a full disk included); one that a kill left
    behind is removed by whoever writes into the folder next.

    Raises:
        CordaError: nothing can be written there: no permission, no space, a folder or a device of that name.
    """
    path = _target(path)
    partial = _partial(path)
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "a device or a pipe"
            raise OSError(None, f"it is {kind}, not a file")
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner may read
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by its own error
        raise cannot_write(path, error) from error
    finally:
        _remove(partial)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its place when the block ends well, and else is removed.

    What was at `path` is replaced as a whole; a kill in between leaves the old folder or the new one, or for the
    moment between two renames neither: the next call puts the old one back first.

    Raises:
        CordaError: nothing can be written there.
    """
    path = _target(path)
    partial = _partial(path)
    replaced = replaced_folder(path)
    try:
        if path.exists() and not path.is_dir():  # a device would be renamed like a file
            raise OSError(None, "it is a file, a device or a pipe, not a folder")
        put_back(path)
        _remove(replaced)
        partial.mkdir()
        yield partial
        if path.exists():
            path.rename(replaced)
        try:
            partial.rename(path)
        except OSError:
            put_back(path)
            raise
        _remove(replaced)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        _remove(partial)


def replaced_folder(path: Path) -> Path:
    """Where `atomic_folder` keeps what it replaces, for the moment between two renames."""
    return path.with_name(f".{path.name}{REPLACED}")


def put_back(path: Path) -> None:
    """Undo a replacement of the folder `path` that a kill or an error interrupted between its two renames."""
    replaced = replaced_folder(path)
    if replaced.exists() and not path.exists():
        replaced.rename(path)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
