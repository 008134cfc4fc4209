"""The formats of results that are read, and reading what is at a path, whatever it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.files import home_path, shown
from corda_vlm.registries import register
from corda_vlm.report.formats import clip_benchmark, lm_eval, lmms_eval, ours, vlmevalkit
from corda_vlm.report.formats.base import Format, Measured

FORMATS: dict[str, Format] = {}
"""Name -> format. All of them are tried, as a folder may hold the results of several tools."""

_MOST_FILES = 20_000


def register_format(format: Format) -> Format:
    """Let `corda-vlm report --before … --after …` read the results of another tool.

    Raises:
        CordaError: another format has this name.
    """
    return register(FORMATS, "format of results", format.name, format)


for _module in (lm_eval, lmms_eval, clip_benchmark, vlmevalkit, ours):
    register_format(_module.FORMAT)


def read_results(path: str | Path) -> list[Measured]:
    """The models that were measured in a folder or a file, of every format that is in it.

    Raises:
        ForeignFileError: nothing there is of a format that is read, or a file is empty, truncated or damaged.
    """
    place = home_path(path)
    if not place.exists():
        raise ForeignFileError(f"no results at {shown(place)}; give a folder or a file of them")
    files, models = _files(place), []
    for format in FORMATS.values():
        if own := format.find(files):
            models += format.read(own)
    if not any(model.measures for model in models):
        raise ForeignFileError(
            f"{shown(place)} holds no results that are read here. These are: {_known()}"
        )
    return [_named(model, place) for model in models if model.measures]


def _known() -> str:
    return "; ".join(f"{one.name} ({one.files})" for one in FORMATS.values())


def _files(place: Path) -> list[Path]:
    """The plain files of a folder, those of its own folders too, in the order of their names."""
    if not place.is_dir():
        return [place]
    files = list(itertools.islice(_walk(place), _MOST_FILES + 1))
    if len(files) > _MOST_FILES:
        raise CordaError(
            f"{shown(place)} holds more than {_MOST_FILES:,} files; give the folder of the results alone"
        )
    return sorted(files)


def _walk(folder: Path) -> Iterator[Path]:
    for one in sorted(folder.iterdir()):
        if one.name.startswith("."):
            continue
        if one.is_dir() and not one.is_symlink():
            yield from _walk(one)
        elif one.is_file():
            yield one


def _named(model: Measured, place: Path) -> Measured:
    """With the name of the folder or file, where its own files give none."""
    return model if model.name else replace(model, name=place.resolve().stem)
