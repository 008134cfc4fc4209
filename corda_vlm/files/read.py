"""Reads of plain files alone, with errors that say which file and why not."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from pathlib import Path

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.files.paths import shown


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


def file_digest(path: Path) -> str:
    """SHA-256 of what a file holds, in hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pieces(path: Path) -> Iterator[bytes]:
    """What a file holds, a mebibyte at a time."""
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece
