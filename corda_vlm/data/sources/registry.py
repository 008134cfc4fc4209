"""The kinds of sources by name: how each is read, what can be said before that, and which options it takes.

What stands here is all that the rest of the package knows of a kind: a new one is a file with its reader, and a line here or
a call of `register_source`. Readers are imported when one is called, so that to know their names takes little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_vlm.data.paths import find_paths
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.lazy import later
from corda_vlm.registries import register

if TYPE_CHECKING:
    from corda_vlm.data.sources.table import Table
    from corda_vlm.data.spec import DataSpec

Reader = Callable[["DataSpec", "str | Path | None"], "Table"]
"""(the spec, the file that names it or None) -> what there is to read."""

Check = Callable[["DataSpec", "str | Path | None"], Any]
"""(the spec, the file that names it or None): raises a `CordaError` for what is not there."""

SOME_TAKE = ("root", "rows", "separator")
"""The options of a spec that some kinds of sources take, and others refuse."""


def check_files(spec: DataSpec, beside: str | Path | None) -> None:
    """The files or folders that a spec names are there. Raises `DataError` where nothing is."""
    find_paths(spec.location, beside)


@dataclass(frozen=True)
class SourceKind:
    """A kind of source.

    Attributes:
        read: turns a spec into a table, without decoding a picture.
        check: says what is missing before anything is read; None where nothing can be said.
        takes: those of `SOME_TAKE` that it takes.
        own_root: `root` is where the source itself lies, which else is what its paths of pictures are relative to.
    """

    read: Reader
    check: Check | None = None
    takes: Sequence[str] = ("root",)
    own_root: bool = False


def _here(module: str, name: str) -> Callable[..., Any]:
    """A function of a module beside this one, imported when it is called."""
    return later(f"corda_vlm.data.sources.{module}", name)


SOURCES: dict[str, SourceKind] = {
    "sklearn": SourceKind(
        _here("libraries", "read_sklearn"), _here("libraries", "check_sklearn"), takes=()
    ),
    "parquet": SourceKind(_here("parquet", "read_parquet"), check_files),
    "folder": SourceKind(_here("folders", "read_folder"), check_files, takes=()),
    "webdataset": SourceKind(_here("webdataset", "read_webdataset"), check_files),
    "hf": SourceKind(_here("libraries", "read_hf"), _here("libraries", "check_hf")),
    "torchvision": SourceKind(
        _here("libraries", "read_torchvision"),
        _here("libraries", "torchvision_root"),
        own_root=True,
    ),
    "jsonl": SourceKind(_here("lines", "read_jsonl"), check_files, takes=("root", "rows")),
    "json": SourceKind(_here("lines", "read_json"), check_files, takes=("root", "rows")),
    "csv": SourceKind(_here("csv", "read_csv"), check_files, takes=SOME_TAKE),
    "tsv": SourceKind(_here("csv", "read_tsv"), check_files, takes=("root", "rows")),
    "text": SourceKind(_here("lines", "read_documents"), check_files, takes=()),
}


def register_source(
    kind: str, reader: Reader, *, check: Check | None = None, takes: Sequence[str] = ("root",)
) -> Reader:
    """Make a kind of source of your own known, so that data may be called `"kind:where"`. Returns the reader.

    Args:
        kind: the word before the colon.
        reader: (spec, the file that names it or None) -> `Table`. `spec.location` is what stands after the colon.
        check: (spec, the file that names it or None), raises a `CordaError` for what is not there; it is called before a
            model is loaded. None where nothing can be said that early.
        takes: which of the options `root`, `rows` and `separator` of a spec it takes; the others are an error. `root`
            takes no work of the reader: paths of pictures are relative to it.

    Raises:
        CordaError: another source has that name, or it holds a colon.
        UnknownNameError: an option in `takes` that is none of these.
    """
    if isinstance(kind, str) and ":" in kind:
        raise CordaError(f"a source cannot be called {kind!r}: data is written kind:where")
    for option in takes:
        if option not in SOME_TAKE:
            raise UnknownNameError(f"option that source {kind} takes", option, SOME_TAKE)
    source = SourceKind(reader, check, tuple(takes))
    if isinstance(kind, str) and SOURCES.get(kind) == source:
        return reader
    return register(SOURCES, "source", kind, source).read
