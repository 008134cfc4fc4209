"""What ships under eval/ by name, or lies in a file of the user's: suites, templates, class names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.files import asset, resolve, shown


def find_shipped(
    source: str | Path, pattern: str, kind: str, built_in: Sequence[str], beside: Path | None
) -> Path:
    """The file that `source` names: one that ships, else a path as given, or beside the file that names it.

    Args:
        pattern: of the files that ship, below eval/, e.g. "suites/*.yaml".
        kind: what is looked for, for messages.
        built_in: names that need no file, for messages.

    Raises:
        UnknownNameError: none of these; lists the names.
    """
    folder = asset("eval")
    try:
        named = folder / pattern.replace("*", str(source))
        if named.is_file():
            return named
        return resolve(source, beside)
    except (CordaError, OSError, ValueError):
        names = [*built_in, *(path.stem for path in folder.glob(pattern))]
        raise UnknownNameError(kind, shown(source), names, "Or give the path of a file.") from None
