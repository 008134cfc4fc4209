"""JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.files.paths import shown
from corda_vlm.files.read import read_bytes
from corda_vlm.files.write import write_text


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
