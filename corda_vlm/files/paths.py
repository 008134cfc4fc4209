"""Paths as users write them, as messages say them, and as the package ships them."""

from __future__ import annotations

import os
from pathlib import Path

from corda_vlm.errors import CordaError

_PACKAGE = Path(__file__).resolve().parents[1]
# An install carries `model_zoo/`, `eval/` and `configs/` inside the package; a checkout has them beside it.
_ASSETS = _PACKAGE / "_assets" if (_PACKAGE / "_assets").is_dir() else _PACKAGE.parent


def asset(path: str | Path) -> Path:
    """The file or folder that ships with the package under `path`, e.g. `"configs/demo.yaml"`.

    Raises:
        CordaError: nothing of that name ships with the package; the message lists its folder.
    """
    shipped = _ASSETS / path
    if not shipped.exists():
        folder = shipped.parent
        beside = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        raise CordaError(
            f"no shipped asset {str(path)!r}; {folder.name}/ has: {', '.join(beside) or 'nothing'}"
        )
    return shipped


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
