"""JSON lines: one object a line, read and appended at this one place, whatever a kill left behind.

A file of lines is only ever added to at its end, in one write. A kill within that write leaves a last line without its
end: a reader leaves it out and says so, and the next writer cuts it off before it adds its own.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from corda_vlm.errors import CordaError, ForeignFileError, brief
from corda_vlm.files import as_json, check_path, read_bytes, shown, write_text
from corda_vlm.locks import locked

logger = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds to wait for another process that adds to the same file."""

Row = dict[str, Any]
Check = Callable[[Row], str | None]
"""What is wrong with a row, in words that follow its line's number; None where nothing is."""


def read_jsonl(
    path: str | Path,
    what: str,
    *,
    check: Check | None = None,
    missing_ok: bool = False,
    hint: str = "",
) -> list[Row]:
    """The objects of a file of JSON lines.

    A last line that a kill cut short, so one without its end, is left out with a warning.

    Args:
        what: names the kind of row in messages, e.g. "score".
        check: says what is wrong with a row that is JSON.
        missing_ok: no file is a file without rows.
        hint: what to do where there is no file.

    Raises:
        ForeignFileError: no such file, one that cannot be read, or a line that is no object, not UTF-8, holds NaN or
            Inf, or that `check` refuses; names the file and the line.
    """
    path = Path(path)
    if check_path(path).exists():
        content = read_bytes(path, f"file of {what}s")
    elif missing_ok:
        return []
    else:
        raise ForeignFileError(f"no {what}s at {path}" + (f"; {hint}" if hint else ""))
    *lines, rest = content.split(b"\n")
    if _is_row(rest):
        lines.append(rest)  # only the end of the line is missing
    elif rest:
        logger.warning("%s: its last line was cut short by an interruption and is dropped", path)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_row(line)
            wrong = check(row) if check is not None else None
        except ValueError as error:
            wrong = str(error)
            row = {}
        if wrong is not None:
            raise ForeignFileError(f"{path}, line {number}, is not a {what}: {wrong}")
        rows.append(row)
    return rows


def append_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]], what: str) -> None:
    """Add rows to a file of JSON lines in one write, and force them to the disk.

    Another process that writes there is waited for. A line torn by a kill during an earlier write is cut off first, else the new row would be glued to it and both lost.

    Raises:
        CordaError: a value is NaN, Inf or no JSON, and nothing is written; or the disk is full.
    """
    path = Path(path)
    content = _dumped(path, rows, what).encode()
    if not content:
        return
    with locked(path, wait=PATIENCE):
        try:
            _cut_torn_line(path)
            # One write to a descriptor in append mode: a reader sees whole rows, or a torn last one.
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                written = os.write(descriptor, content)
                if written < len(content):  # the disk filled up half-way
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CordaError(
                f"could not add to {shown(path)}: {error.strerror or error}. The rows before are untouched; free some space "
                "or give another folder, and run the same command again."
            ) from error


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]], what: str) -> None:
    """Write a whole file of JSON lines, atomically.

    Raises:
        CordaError: as `append_jsonl`.
    """
    write_text(path, _dumped(Path(path), rows, what))


def parse_row(line: bytes) -> Row:
    """The object that one line holds.

    Raises:
        ValueError: not UTF-8, not JSON, no object, nested too deeply, or a number that is not finite.
    """
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refused, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"it holds no JSON object, but {brief(row)}")
    return row


def is_number(value: Any) -> bool:
    """Is `value` of JSON a finite number? `true` is none, nor is an integer beyond what a float holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -1e308 < value < 1e308


def wrong_field(
    row: Mapping[str, Any],
    needed: Mapping[str, Callable[[Any], bool]],
    optional: Mapping[str, Callable[[Any], bool]],
) -> str | None:
    """What is wrong with the fields of a row: one that is missing, or the first whose value is refused."""
    if missing := sorted(needed.keys() - row.keys()):
        return f"no {', '.join(missing)}"
    for name, accepts in {**needed, **optional}.items():
        value = row.get(name)
        if not accepts(value) and not (value is None and name in optional):
            return f"its {name} is {brief(value)}"
    return None


def _refused(constant: str) -> float:
    raise ValueError(f"it holds {constant}, which is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:40]}, which is beyond what a number holds")
    return value


def _dumped(path: Path, rows: Iterable[Mapping[str, Any]], what: str) -> str:
    try:
        return "".join(f"{as_json(dict(row))}\n" for row in rows)
    except (TypeError, ValueError, RecursionError) as error:
        raise CordaError(f"a {what} for {path} cannot be written as JSON: {error}") from error


def _is_row(line: bytes) -> bool:
    try:
        parse_row(line)
    except ValueError:
        return False
    return True


def _cut_torn_line(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        content = file.read()
        keep = content.rfind(b"\n") + 1
        torn = content[keep:]
        if not torn:
            return
        if _is_row(torn):  # only its newline is missing; the file position is at the end
            file.write(b"\n")
            return
        logger.warning(
            "%s: its last line was cut short by an interruption and is dropped (%d bytes)",
            path, len(torn),
        )  # fmt: skip
        file.truncate(keep)
