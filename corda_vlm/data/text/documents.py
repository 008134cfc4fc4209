"""Plain text: documents, or pieces of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import replace

from corda_vlm.data.columns import CUT_TEXT, is_whole
from corda_vlm.data.sources.table import Table, pick_column
from corda_vlm.data.spec import DataSpec
from corda_vlm.data.text.rows import made_of
from corda_vlm.errors import DataError


def documents(table: Table, spec: DataSpec) -> Table:
    """Documents, or pieces of `spec.chunk` words with the white space as it was."""
    column = pick_column(table, "text", spec.text, spec)
    if column is None or column in table.images:
        raise DataError(
            f"{spec}: has no text column; its columns are {', '.join(table.names)}: name it with text:"
        )
    parents: list[int] = []
    texts: list[str] = []
    faults: dict[int, str] = {}
    places: list[int] = []
    for row, stored in enumerate(table.columns[column]):
        if not isinstance(stored, str) or not stored.strip():
            faults[len(texts)] = f"its {column} is no text" if stored is not None else "has no text"
            stored = ""
        elif not is_whole(stored):
            faults[len(texts)] = CUT_TEXT
        for number, piece in enumerate(pieces(stored, spec.chunk)):
            parents.append(row)
            texts.append(piece)
            places.append(number)
    rest = {name: values for name, values in table.columns.items() if name != column}
    columns = {name: [values[row] for row in parents] for name, values in rest.items()}
    part = (lambda row: "") if spec.chunk is None else (lambda row: f"piece {places[row]}")
    made = made_of(table, parents, {**columns, column: texts, "text": texts}, faults, part)
    return replace(made, images={})


def pieces(text: str, words: int | None) -> Iterable[str]:
    if words is None or not text:
        return [text]
    starts = [0, *(match.start() for match in re.finditer(r"(?<=\s)\S", text))]
    if text[:1].isspace() and len(starts) > 1:
        starts = [0, *starts[2:]]  # white space before the first word is no word
    cuts = [*starts[::words], len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]
