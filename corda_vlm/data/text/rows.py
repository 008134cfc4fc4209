"""What the formats share: rows of no use, and tables made of other tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from corda_vlm.data.sources.table import Table

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": str or list of parts}, with "tool_calls" where it calls tools."""


MAY_CALL = "may_call"
"""The column of the descriptions of the tools that a conversation may call."""


class Fault(ValueError):
    """Why one row is no usable record."""


def not_text(what: str, stored: Any) -> Fault:
    """The fault of a value of another type, e.g. "its question is an int, not text"."""
    kind = type(stored).__name__
    return Fault(f"its {what} is {'an' if kind[0] in 'aeiou' else 'a'} {kind}, not text")


Columns = tuple[dict[str, list[Any]], dict[int, str]]


def each(table: Table, make: Callable[[int], dict[str, Any]], names: Sequence[str]) -> Columns:
    columns: dict[str, list[Any]] = {name: [] for name in names}
    faults: dict[int, str] = {}
    for row in range(table.size):
        made: dict[str, Any] = {}
        if row not in table.faults:
            try:
                made = make(row)
            except Fault as fault:
                faults[row] = str(fault)
            except RecursionError:
                faults[row] = "holds lists in lists, hundreds deep"
        for name in names:
            columns[name].append(made.get(name))
    return columns, faults


def made_of(
    table: Table,
    parents: list[int],
    columns: dict[str, list[Any]],
    faults: dict[int, str],
    part: Callable[[int], str],
) -> Table:
    """A table whose row i is made of row `parents[i]` of `table`.

    Args:
        part: row -> which part of its parent it is, for people; "" for all of it.
    """

    def image(get: Callable[[int], Any]) -> Callable[[int], Any]:
        return lambda row: get(parents[row])

    def place(row: int) -> str:
        return ", ".join(filter(None, (table.place(parents[row]), part(row))))

    return replace(
        table,
        size=len(parents),
        columns=columns,
        images={name: image(get) for name, get in table.images.items()},
        place=place,
        parents=parents,
        faults=faults,
    )


def unpacked(stored: Any) -> Any:
    """A value that may be written as JSON."""
    if not isinstance(stored, str):
        return stored
    try:
        return json.loads(stored)
    except (ValueError, RecursionError):
        return None
