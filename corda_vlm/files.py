"""Files: shipped assets, and writes that leave either the old file or the whole new one."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.processes import Process, this_process

LOCK, HOLDER = ".corda_vlm.lock", ".corda_vlm.holder"
"""Names of a lock and of who holds it (see `corda_vlm.locks`): in a folder as they are, of a file after its name."""

_PARTIAL, _REPLACED = ".partial", ".replaced"
_NUMBERS = itertools.count()

_PACKAGE = Path(__file__).resolve().parent
# An install carries `model_zoo/`, `eval/` and `configs/` inside the package; a checkout has them beside it.
_ASSETS = _PACKAGE / "_assets" if (_PACKAGE / "_assets").is_dir() else _PACKAGE.parent


def asset(path: str | Path) -> Path:
    """The file or folder that ships with the package under `path`, e.g. `"configs/demo.yaml"`.

    Raises:
        CordaError: nothing of that name ships with the package; the message lists its folder.
    """
    found = _ASSETS / path
    if not found.exists():
        folder = found.parent
        beside = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        raise CordaError(
            f"no shipped asset {str(path)!r}; {folder.name}/ has: {', '.join(beside) or 'nothing'}"
        )
    return found


def resolve(path: str | Path, beside: str | Path | None = None) -> Path:
    """`path` as the user wrote it: as given, beside the file that names it, or among the shipped assets.

    Raises:
        CordaError: it is in none of them; the message lists where was looked.
    """
    try:
        tried = [home_path(path)]
        if beside is not None:
            tried.append(Path(beside).parent / path)
        tried.append(_ASSETS / path)
        for candidate in tried:
            if candidate.exists():
                return candidate
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise CordaError(f"{shown(path)} is no path: {reason}") from error
    raise CordaError(f"no file {shown(path)!r}; looked at: {', '.join(map(shown, tried))}")


def shown(path: str | Path) -> str:
    """A path as a message says it: without characters that do not print, and not longer than a line or two."""
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(path))
    return text if len(text) <= 300 else f"{text[:150]} … {text[-100:]}"


def entries(folder: str | Path) -> list[Path]:
    """What lies in a folder, in order, but for partial files and locks, which are nobody's work."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not is_ours_for_now(path.name))


def is_ours_for_now(name: str) -> bool:
    """Is this the name of a partial file or folder, or of a lock? They come and go with a process."""
    return name.startswith(".") and (
        name.endswith((_PARTIAL, _REPLACED)) or LOCK in name or HOLDER in name
    )


def sweep(folder: str | Path) -> None:
    """Remove the partial files and folders in `folder` whose writers have ended, killed half way.

    Those of living processes stay, and those of other hosts, of which nothing is known here.
    """
    with suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            if not entry.name.endswith(_PARTIAL):
                continue
            writer = Process.parse(entry.name.removesuffix(_PARTIAL).rpartition(".")[2])
            if writer is not None and writer.is_gone:
                _remove(Path(entry.path))


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
    return path.with_name(f".{stem}.{next(_NUMBERS)}.{this_process()}{_PARTIAL}")


def check_path(path: str | Path) -> Path:
    """`path` itself, which is asked of the system from here on.

    Raises:
        CordaError: no system takes it as a path: empty, too long, or with a NUL character.
    """
    text = os.fspath(path)
    if "\0" in text or not text:
        raise CordaError(f"{shown(text)!r} is no path: it is empty or holds a NUL character")
    if len(os.fsencode(text)) > 4095 or any(len(os.fsencode(p)) > 255 for p in text.split("/")):
        raise CordaError(f"{shown(text)} is no path: it is too long; choose a shorter name")
    return Path(path)


def home_path(path: str | Path) -> Path:
    """`path` with its `~`, if any, as the user's folder.

    Raises:
        CordaError: it is no path, or there is no such user.
    """
    try:
        return check_path(path).expanduser()
    except RuntimeError as error:
        raise CordaError(f"{shown(path)} is no path: there is no such user") from error


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
    told = str(error).lower()
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    if number in (errno.ENOTDIR, errno.EEXIST):
        above = next((p for p in Path(path).parents if p.exists() and not p.is_dir()), None)
        if above is not None:
            reason = f"{shown(above)} is a file, not a folder"
        remedy = "name a path whose folders are folders"
    elif number == errno.EISDIR:
        reason, remedy = "it is a folder", "name a file"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS) or "denied" in told:
        remedy = "choose a folder that you may write to"
    elif number == errno.ENAMETOOLONG:
        remedy = "choose a shorter name"
    elif number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in told:
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
    return path.with_name(f".{path.name}{_REPLACED}")


def put_back(path: Path) -> None:
    """Undo a replacement of the folder `path` that a kill or an error interrupted between its two renames."""
    replaced = replaced_folder(path)
    if replaced.exists() and not path.exists():
        replaced.rename(path)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN and Inf are refused."""
    write_text(path, as_json(value, indent=2) + "\n")


def as_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that UTF-8 can hold.

    Raises:
        ValueError: NaN or Inf.
    """
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8
        text = json.dumps(value, indent=indent, allow_nan=False)
    return text


def read_json(path: str | Path, what: str = "JSON") -> Any:
    """Read JSON from `path`.

    Raises:
        ForeignFileError: no file, not UTF-8, or not JSON; `what` names the kind of file in the message.
    """
    try:
        content = read_bytes(path, f"{what} file")
        return json.loads(content.decode("utf-8"))
    # RecursionError: lists in lists in lists, thousands deep
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, CordaError):
            raise
        raise ForeignFileError(
            f"{shown(path)} is not a {what} file ({shown(str(error))}); it may be truncated or of another kind. Make it again."
        ) from error


def plain_file(
    path: str | Path, what: str = "file", error: type[CordaError] = ForeignFileError
) -> Path:
    """`path`, if it is a file that can be opened without harm: reading a pipe may never end, nor a device.

    Args:
        what: names the kind of file in messages, e.g. "plan file".
        error: the class of the error.

    Raises:
        CordaError: there is nothing, a folder, a device or a pipe, or it may not be looked at.
    """
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError as missing:
        raise error(f"no {what} at {shown(path)}") from missing
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the path
        raise unreadable(path, cause, error) from cause
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise error(f"{shown(path)}: is {kind}; a {what} was expected")
    return Path(path)


def read_bytes(
    path: str | Path,
    what: str = "file",
    error: type[CordaError] = ForeignFileError,
    *,
    at_most: int | None = None,
) -> bytes:
    """The bytes of a plain file.

    Args:
        what, error: as of `plain_file`.
        at_most: bytes; None for any number.

    Raises:
        CordaError: as of `plain_file`, or it cannot be read, or it is larger.
    """
    try:
        with plain_file(path, what, error).open("rb") as file:
            content = file.read() if at_most is None else file.read(at_most + 1)
    except (OSError, MemoryError) as cause:
        raise unreadable(path, cause, error) from cause
    if at_most is not None and len(content) > at_most:
        raise error(f"{shown(path)} is above {at_most // 1_000_000} MB; is it another file?")
    return content


def read_text(
    path: str | Path,
    what: str = "file",
    error: type[CordaError] = ForeignFileError,
    *,
    at_most: int | None = None,
) -> str:
    """The text of a plain file in UTF-8, with or without a mark of byte order.

    Raises:
        CordaError: as of `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, what, error, at_most=at_most).decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(
            f"{shown(path)}: not UTF-8 text ({cause.reason} at byte {cause.start:,}); save it as UTF-8"
        ) from cause


def unreadable(path: str | Path, cause: BaseException, error: type[CordaError]) -> CordaError:
    """The error that says why a path cannot be read."""
    reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return error(f"{shown(path)}: cannot be read ({reason})")


def pieces(path: Path) -> Iterator[bytes]:
    """What a file holds, a mebibyte at a time."""
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece
