"""Files: shipped assets, and writes that leave either the old file or the whole new one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from corda_vlm.errors import CordaError, ForeignFileError

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
    tried = [Path(path).expanduser()]
    if beside is not None:
        tried.append(Path(beside).parent / path)
    tried.append(_ASSETS / path)
    for candidate in tried:
        if candidate.exists():
            return candidate
    raise CordaError(f"no file {str(path)!r}; looked at: {', '.join(map(str, tried))}")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it onto `path` only when the block ends well.

    A reader, or a process killed at any moment, sees the old file or the new one, never a part.
    The partial file is removed when the block raises (a full disk included).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner may read
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by its own error
        raise CordaError(
            f"could not write {path}: {getattr(error, 'strerror', None) or error}. The former file, if any, is untouched; "
            "free some space or choose another folder, then run the same command again."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN and Inf are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | Path, what: str = "JSON") -> Any:
    """Read JSON from `path`.

    Raises:
        ForeignFileError: no file, not UTF-8, or not JSON; `what` names the kind of file in the message.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ForeignFileError(f"no {what} file at {path}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ForeignFileError(
            f"{path} is not a {what} file ({error}); it may be truncated or of another kind. Make it again."
        ) from error
