"""Paths as users write them in data specs, and the plain files that they have to be."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from corda_vlm import files
from corda_vlm.errors import CordaError, DataError
from corda_vlm.files import asset, home_path, resolve, shown

MOST_PATHS = 100_000
"""What a pattern with braces may stand for; more is a slip, which would fill the memory."""


def find_paths(pattern: str | Path, beside: str | Path | None = None) -> list[Path]:
    """The files or folders that `pattern` names: as given, else beside the file that names it, else shipped.

    `{000..012}` and `{a,b}` are expanded as webdataset does, then shell wildcards. Sorted, no duplicates.

    Raises:
        DataError: nothing matches, or it is no path; the message says where was looked.
    """
    try:
        written = os.path.expandvars(home_path(pattern))
    except CordaError as error:
        raise DataError(str(error)) from error
    if "$" in written:
        raise DataError(f"{pattern}: an environment variable in this path is not set ({written})")
    expanded = list(itertools.islice(_braces(written), MOST_PATHS + 1))
    if len(expanded) > MOST_PATHS:
        raise DataError(f"{shown(pattern)}: its braces stand for more than {MOST_PATHS:,} paths")
    return sorted({path for one in expanded for path in _matches(one, beside)})


def find_one(pattern: str | Path, beside: str | Path | None = None) -> Path:
    """The only path that `pattern` names. Raises `DataError` for none or several."""
    paths = find_paths(pattern, beside)
    if len(paths) != 1:
        raise DataError(
            f"{shown(pattern)} names {len(paths)} paths, {shown(paths[0])} and others; it must name one"
        )
    return paths[0]


def plain_file(path: Path) -> Path:
    """`path`, if it is a file that can be opened without harm. Raises `DataError` where it is none."""
    return files.plain_file(path, error=DataError)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises `DataError` for no plain file, one that cannot be read, or other text."""
    return files.read_text(path, error=DataError)


def unreadable(path: Path, error: Exception) -> CordaError:
    """The `DataError` that says why a path cannot be read."""
    return files.unreadable(path, error, DataError)


def _matches(pattern: str, beside: str | Path | None) -> list[Path]:
    """What one pattern without braces names, in the order of `corda_vlm.files.resolve`."""
    parts = Path(pattern).parts
    wild = next(
        (i for i, part in enumerate(parts) if any(mark in part for mark in "*?[")), len(parts)
    )
    try:
        if wild == len(parts):
            return [resolve(pattern, beside)]
        bases = [Path(), *([Path(beside).parent] if beside is not None else []), asset(".")]
        for base in bases:
            if paths := list((base / Path(*parts[:wild])).glob(str(Path(*parts[wild:])))):
                return paths
    except CordaError as error:
        raise DataError(f"no such data: {error}") from error
    except (OSError, ValueError, NotImplementedError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{shown(pattern)} is no pattern of paths: {reason}") from error
    looked = ", ".join(shown(base / pattern) for base in bases)
    raise DataError(f"no data matches {shown(pattern)!r}; looked at: {looked}")


def _braces(pattern: str) -> Iterator[str]:
    """`a{0..2}b` -> a0b a1b a2b (leading zeros kept); `a{x,y}` -> ax ay."""
    before, opening, rest = pattern.partition("{")
    inside, closing, after = rest.partition("}")
    if not opening or not closing:
        yield pattern
        return
    first, dots, last = inside.partition("..")
    choices: Iterator[str] = iter(inside.split(","))
    # Twelve digits: more cannot be counted to, and far more cannot be read as a number.
    if dots and all(end.isascii() and end.isdigit() and len(end) <= 12 for end in (first, last)):
        numbers = range(int(first), int(last) + 1)
        choices = (str(number).zfill(len(first)) for number in numbers)
    for choice in choices:
        for tail in _braces(after):
            yield before + choice + tail
