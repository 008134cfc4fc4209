"""Plugins: Python files of the user's own, run before anything else because the user names them, and never otherwise.

    plugins: [my.py]          # in a config
    corda-vlm run demo.yaml --plugin my.py

A plugin registers what it brings (`corda_vlm.register_method`, …). No model's, data's or run's folder names one.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType

from corda_vlm.errors import CordaError, first_line
from corda_vlm.files import home_path, read_bytes, shown
from corda_vlm.progress import note

OPTION = "--plugin"
_digests: dict[Path, str] = {}  # of those that ran in this process
_of_command: list[str] = []


@contextmanager
def of_command(files: Sequence[str]) -> Iterator[None]:
    """Run the plugins that a command names; within the block `named_in_command` gives them."""
    run_plugins(files)
    _of_command.extend(files)
    try:
        yield
    finally:
        _of_command.clear()


def named_in_command() -> tuple[str, ...]:
    """The plugins that the command in progress names, as it wrote them; none where Python calls the package."""
    return tuple(_of_command)


def run_plugin(path: str | Path, beside: str | Path | None = None) -> str:
    """Run a Python file, and say so; one that ran in this process is not run again. Returns the digest of what ran.

    Args:
        path: as the user wrote it.
        beside: the file that names it; the path may be relative to it.

    Raises:
        CordaError: no such file, one that is no `.py`, an exception in it, or it has changed since it ran.
    """
    if Path(path).suffix != ".py":
        raise CordaError(f"the plugin {shown(path)} is no Python file; its name ends in .py")
    found = _find(path, beside)
    source = read_bytes(found, "plugin", CordaError, at_most=10_000_000)
    digest = hashlib.sha256(source).hexdigest()[:16]
    if found not in _digests:
        note(f"running the plugin {shown(found)}")
        _run(found, source)
        _digests[found] = digest
    elif _digests[found] != digest:
        raise CordaError(
            f"the plugin {shown(path)} was run by this process, and has changed since; start a new process"
        )
    return digest


def run_plugins(
    paths: Sequence[str],
    beside: str | Path | None = None,
    others: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Run several, in this order; returns "the plugin NAME" -> digest, for what results are made from.

    Args:
        others: what this function returned of plugins that are named elsewhere; they are in the answer too.

    Raises:
        CordaError: as of `run_plugin`, or two that differ have one name.
    """
    digests = dict(others)
    for path in paths:
        name, digest = f"the plugin {Path(path).name!r}", run_plugin(path, beside)
        if digests.setdefault(name, digest) != digest:
            raise CordaError(f"two plugins are called {Path(path).name!r}; rename one of them")
    return digests


def without_plugins(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command without its `--plugin FILE`s, and those files.

    Raises:
        CordaError: one without its file.
    """
    rest, files = [], []
    left: Iterator[str] = iter(words)
    for word in left:
        option, equals, value = word.partition("=")
        if option != OPTION:
            rest.append(word)
            continue
        if not (file := value if equals else next(left, "")):
            raise CordaError(f"{OPTION} needs a value: {OPTION} FILE.py")
        files.append(file)
    return rest, files


def _find(path: str | Path, beside: str | Path | None) -> Path:
    """The file that is meant: of a config the one beside it, before any in the working directory."""
    written = home_path(path)
    places = ([Path(beside).parent / written] if beside is not None else []) + [written]
    return next((place for place in places if place.is_file()), places[0]).resolve()


def _run(path: Path, source: bytes) -> None:
    """Run what was read: a file that is imported could be another by then, and would leave its bytecode beside it."""
    module = ModuleType(f"corda_vlm_plugin_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise CordaError(
            f"the plugin {shown(path)} failed{_line(error, path)}: {type(error).__name__}: {first_line(error)}"
        ) from error


def _line(error: BaseException, path: Path) -> str:
    """Where in the plugin it failed."""
    if isinstance(error, SyntaxError):
        return f" in line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f" in line {lines[-1]}" if lines else ""
