"""The kinds of sources by name: each has a reader, which turns a `DataSpec` into a `Table` without decoding a picture.

Readers are imported when one is called, so that to know their names takes little.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from corda_vlm.errors import CordaError
from corda_vlm.lazy import later
from corda_vlm.registries import register

if TYPE_CHECKING:
    from corda_vlm.data.sources.table import Table
    from corda_vlm.data.spec import DataSpec

Reader = Callable[["DataSpec", "str | Path | None"], "Table"]
"""(the spec, the file that names it or None) -> what there is to read."""


def _reader(module: str, name: str) -> Reader:
    """A reader of a module beside this one, imported when it is called."""
    return later(f"corda_vlm.data.sources.{module}", name)


READERS: dict[str, Reader] = {
    "sklearn": _reader("libraries", "read_sklearn"),
    "parquet": _reader("parquet", "read_parquet"),
    "folder": _reader("folders", "read_folder"),
    "webdataset": _reader("folders", "read_webdataset"),
    "hf": _reader("libraries", "read_hf"),
    "torchvision": _reader("libraries", "read_torchvision"),
    "jsonl": _reader("lines", "read_jsonl"),
    "json": _reader("lines", "read_json"),
    "csv": _reader("lines", "read_csv"),
    "tsv": _reader("lines", "read_csv"),
    "text": _reader("lines", "read_documents"),
}


def register_source(kind: str, reader: Reader) -> Reader:
    """Make a kind of source of your own known, so that data may be called `"kind:where"`. Returns the reader.

    Args:
        kind: the word before the colon.
        reader: (spec, the file that names it or None) -> `Table`. `spec.location` is what stands after the colon.

    Raises:
        CordaError: another source has that name, or it holds a colon.
    """
    if isinstance(kind, str) and ":" in kind:
        raise CordaError(f"a source cannot be called {kind!r}: data is written kind:where")
    return register(READERS, "source", kind, reader)
