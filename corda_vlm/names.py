"""Names: those that become files and folders, and lists of them in sentences."""

from __future__ import annotations

from collections.abc import Iterable

from corda_vlm.errors import CordaError

MOST_CHARACTERS = 100
_MOST_BYTES = 200  # file systems take 255, and what is written beside a file has a longer name
_RESERVED = {"con", "prn", "aux", "nul"} | {
    f"{port}{n}" for port in ("com", "lpt") for n in "123456789"
}


def check_name(name: object, what: str) -> str:
    """`name`, if it can be a file or folder everywhere, and nowhere but where it is put.

    Args:
        what: says whose name it is, e.g. "the experiment's name".

    Raises:
        CordaError: no text, empty, above 100 characters, with a separator, a leading dot, spaces at an end, or characters
            that cannot be printed.
    """
    if not isinstance(name, str):
        raise CordaError(f"{what} must be text, not {name!r:.100}; put it in quotes")
    if reason := _reason(name):
        raise CordaError(
            f"{what} cannot be {name[:MOST_CHARACTERS]!r}: it names a file or folder, and {reason}"
        )
    return name


def _reason(name: str) -> str | None:
    if not name:
        return "it is empty"
    if len(name) > MOST_CHARACTERS or len(name.encode(errors="replace")) > _MOST_BYTES:
        return f"it has more than {MOST_CHARACTERS} characters"
    if "/" in name or "\\" in name:
        return "it may hold neither / nor \\"
    if not name.isprintable():
        return "it holds characters that cannot be printed"
    if name.startswith(".") or name.endswith("."):
        return "it may not begin or end with a dot"
    if name != name.strip():
        return "it begins or ends with a space"
    if name.lower().partition(".")[0] in _RESERVED:
        return "Windows keeps that name for itself"
    return None


def listed(names: Iterable[object], most: int | None = None) -> str:
    """Names as a sentence lists them: `a, b and c`, or of many `a, b and 7 others`; `none` of none.

    Args:
        most: so many are named where there are more than one beyond them; None for all.
    """
    shown = [str(name) for name in names]
    if most is not None and len(shown) > most + 1:
        shown = [*shown[:most], f"{len(shown) - most} others"]
    if len(shown) < 2:
        return shown[0] if shown else "none"
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def quoted(names: Iterable[object], most: int = 4) -> str:
    """`listed`, each name as Python writes it: for names of somebody's files and models."""
    return listed([repr(name) for name in names], most)
