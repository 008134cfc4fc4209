"""What the rows of a source mean for a model that generates text: conversations, questions, documents.

Each format turns a table into one with the columns `messages` (list of {"role", "content"}, with "learn": False on
answers that are not to be learned, and `may_call`, descriptions of tools), or `text` for plain documents, and `question`, `answers`, `choices`, `choice` where
the data has them. `content` is a string, or a list of {"type": "image"} and {"type": "text", "text": ...} where pictures
belong to the message. Rows that cannot be used are kept as faults of the table, so that they are counted and named as
undecodable pictures are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from corda_vlm.data.columns import CUT_TEXT, asked_column, filled, is_whole
from corda_vlm.data.sources.table import Table, pick_column
from corda_vlm.data.spec import DataSpec
from corda_vlm.data.text.messages import tools_of, with_system
from corda_vlm.data.text.registry import FORMATS
from corda_vlm.data.text.rows import MAY_CALL, Fault, each, unpacked


def conversations(table: Table, spec: DataSpec) -> Table:
    """The table that `spec.format` makes of a source's own.

    Raises:
        UnknownNameError: a column that was asked for does not exist.
        DataError: the columns that the format needs are not there.
    """
    known = FORMATS[str(spec.format)]
    if known.rows is not None:
        table = known.rows(table, spec)
    if known.talk is None:
        return table
    count, stored = _pictures(table, spec)
    columns, faults = known.talk(table, spec, count)
    columns["messages"], more = _with_system(table, spec, columns["messages"])
    if known.tools and "tools" in table.columns:
        described, wrong = each(
            table, lambda row: {MAY_CALL: tools_of(table.columns["tools"][row])}, [MAY_CALL]
        )
        columns, more = columns | described, wrong | more
    faults |= more | _cut_texts(columns)
    return replace(
        table,
        columns={**table.columns, **columns},
        pictures=stored,
        faults={**table.faults, **faults},
    )


def _pictures(
    table: Table, spec: DataSpec
) -> tuple[Callable[[int], int], Callable[[int], list[Any]] | None]:
    """How many pictures a row has, without reading any, and what is stored for them."""
    column = pick_column(table, "images", spec.image, spec)
    if column is None and FORMATS[str(spec.format)].inline and spec.image == "auto":
        inline = _inline_pictures(table, spec)
        return (lambda row: len(inline[row])), ((lambda row: inline[row]) if any(inline) else None)
    if column is None:
        return (lambda row: 0), None
    lazy = table.images.get(column)
    if lazy is not None:  # one a row; that it is there shows when it is decoded
        return (lambda row: 1), lambda row: [lazy(row)]
    values = table.columns[column]

    def stored(row: int) -> list[Any]:
        value = values[row]
        if value is None or value == "":
            return []
        return list(value) if isinstance(value, (list, tuple)) else [value]

    return (lambda row: len(stored(row))), stored


def _with_system(
    table: Table, spec: DataSpec, conversations: list[Any]
) -> tuple[list[Any], dict[int, str]]:
    """The conversations with the system text of their rows before them, and the rows of which that cannot be done."""
    names = list(table.columns)
    asked = spec.system and asked_column(spec.system, _SYSTEM, names, spec, "system")
    if not asked:
        return conversations, {}
    faults: dict[int, str] = {}
    made = []
    for row, messages in enumerate(conversations):
        stored = filled(asked, {name: column[row] for name, column in table.columns.items()})
        try:
            made.append(messages and with_system(messages, stored, asked))
        except Fault as fault:
            made.append(None)
            faults[row] = str(fault)
    return made, faults


def _cut_texts(columns: Mapping[str, list[Any]]) -> dict[int, str]:
    """The rows with a text that holds half of a character, which no tokenizer takes."""
    faults = {}
    for row, messages in enumerate(columns["messages"]):
        contents = [message["content"] for message in messages or ()]
        parts = [part.get("text", "") for c in contents if not isinstance(c, str) for part in c]
        if not is_whole("".join([*(c for c in contents if isinstance(c, str)), *parts])):
            faults[row] = CUT_TEXT
    return faults


def _inline_pictures(table: Table, spec: DataSpec) -> list[list[Any]]:
    """Pictures that messages name themselves."""
    names = FORMATS[str(spec.format)].columns
    columns = [table.columns.get(name, [None] * table.size) for name in names]
    pictures = []
    for row in range(table.size):
        own = []
        lists = [unpacked(column[row]) for column in columns]
        for message in [m for one in lists if isinstance(one, (list, tuple)) for m in one]:
            content = message.get("content") if isinstance(message, Mapping) else None
            for part in content if isinstance(content, (list, tuple)) else ():
                if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
                    value = _named(part)
                    own += [] if value is None else [value]
        pictures.append(own)
    return pictures


def _named(part: Mapping[str, Any]) -> Any:
    """The picture of {"type": "image", "image" | "path" | "url": ...}, or of OpenAI's {"image_url": {"url": ...}}."""
    keys = ("image", "path", "url", "image_url")
    value = next((part[key] for key in keys if part.get(key)), None)
    return value.get("url") if isinstance(value, Mapping) and "url" in value else value


_SYSTEM = ("system", "system_prompt")
