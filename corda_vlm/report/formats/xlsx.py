"""The first sheet of an .xlsx file as rows of text, of which VLMEvalKit makes its predictions.

Such a file is a zip of XML. What is read of it is the sheet's cells and the texts that they share, within bounds, and nothing
is computed or followed.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from corda_vlm.errors import ForeignFileError
from corda_vlm.files import plain_file, shown

_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_MOST_BYTES = 500_000_000
_DAMAGES = (
    zipfile.BadZipFile, zlib.error, ElementTree.ParseError, IndexError, ValueError, EOFError,
    RuntimeError,  # encrypted; and NotImplementedError: packed in a way that zipfile does not know
)  # fmt: skip
_PLACE = re.compile(r"([A-Z]{1,3})\d+")


def read_xlsx(path: Path) -> list[list[str]]:
    """The rows of the first sheet; an empty cell is "".

    Raises:
        ForeignFileError: no such file, or it is truncated or none.
    """
    plain_file(path, "spreadsheet")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            sheets = [name for name in names if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", name)]
            if not sheets:
                raise ForeignFileError(f"{shown(path)} has no sheet")
            first = min(sheets, key=lambda name: (len(name), name))
            texts = "xl/sharedStrings.xml"
            shared = list(_texts(_part(archive, texts, path))) if texts in names else []
            return list(_rows(_part(archive, first, path), shared))
    except (*_DAMAGES, OSError) as error:
        if isinstance(error, ForeignFileError):
            raise
        raise ForeignFileError(
            f"{shown(path)} is no .xlsx file, or a truncated one ({shown(str(error))}); copy it again"
        ) from error


def _part(archive: zipfile.ZipFile, name: str, path: Path) -> ElementTree.Element:
    if archive.getinfo(name).file_size > _MOST_BYTES:
        raise ForeignFileError(f"{shown(path)} holds more than {_MOST_BYTES // 1_000_000} MB")
    content = archive.read(name)
    if b"<!DOCTYPE" in content[:1000] or b"<!ENTITY" in content:  # as no spreadsheet has it
        raise ForeignFileError(f"{shown(path)} declares XML entities, which are not read")
    return ElementTree.fromstring(content)


def _texts(root: ElementTree.Element) -> Iterator[str]:
    for item in root.iter(f"{_MAIN}si"):
        yield "".join(part.text or "" for part in item.iter(f"{_MAIN}t"))


def _rows(root: ElementTree.Element, shared: list[str]) -> Iterator[list[str]]:
    for row in root.iter(f"{_MAIN}row"):
        cells: list[str] = []
        for cell in row.iter(f"{_MAIN}c"):
            place = _PLACE.fullmatch(cell.get("r", ""))
            column = _column(place[1]) if place else len(cells)
            cells += [""] * (column - len(cells))
            cells.append(_value(cell, shared))
        yield cells


def _column(letters: str) -> int:
    number = 0
    for letter in letters:
        number = 26 * number + ord(letter) - ord("A") + 1
    return number - 1


def _value(cell: ElementTree.Element, shared: list[str]) -> str:
    kind = cell.get("t")
    if kind == "inlineStr":
        return "".join(part.text or "" for part in cell.iter(f"{_MAIN}t"))
    value = cell.findtext(f"{_MAIN}v") or ""
    return shared[int(value)] if kind == "s" else value
