"""What the rows of a source mean for a model that generates text: conversations, questions, documents.

Each format turns a table into one with the columns `messages` (list of {"role", "content"}), or `text` for plain
documents, and `question`, `answers`, `choices`, `choice` where the data has them. `content` is a string, or a list of
{"type": "image"} and {"type": "text", "text": ...} where pictures belong to the message. Rows that cannot be used are
kept as faults of the table, so that they are counted and named as undecodable pictures are.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from corda_vlm.data.spec import DataSpec, find_one
from corda_vlm.data.table import Table, pick_column
from corda_vlm.errors import DataError, UnknownNameError

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant", "content": str or list of parts}."""

PLACEHOLDER = "<image>"

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip


class _Fault(ValueError):
    """Why one row is no usable record."""


def conversations(table: Table, spec: DataSpec, beside: str | Path | None = None) -> Table:
    """The table that `spec.format` makes of a source's own.

    Raises:
        UnknownNameError: a column that was asked for does not exist.
        DataError: the columns that the format needs are not there, or `root` is not.
    """
    base = table.base
    if spec.root is not None and spec.kind != "torchvision":
        base = find_one(spec.root, beside)
    table = replace(table, base=base)
    if spec.format == "text":
        return _documents(table, spec)
    if spec.format == "qa":
        table = _expanded(table, spec)
    count, pictures = _pictures(table, spec)
    columns, faults = FORMATS[str(spec.format)](table, spec, count)
    return replace(
        table,
        columns={**table.columns, **columns},
        pictures=pictures,
        faults={**table.faults, **faults},
    )


# ------------------------------------------------------------------ pictures


def _pictures(
    table: Table, spec: DataSpec
) -> tuple[Callable[[int], int], Callable[[int], list[Any]] | None]:
    """How many pictures a row has, without reading any, and what is stored for them."""
    column = pick_column(table, "images", spec.image, spec)
    if column is None and spec.format == "chat" and spec.image == "auto":
        inline = _inline_pictures(table)
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


def _inline_pictures(table: Table) -> list[list[Any]]:
    """Pictures that messages name themselves: {"type": "image", "image" | "path" | "url": ...}."""
    found = []
    for messages in table.columns.get("messages", [None] * table.size):
        own = []
        for message in messages if isinstance(messages, (list, tuple)) else ():
            content = message.get("content") if isinstance(message, Mapping) else None
            for part in content if isinstance(content, (list, tuple)) else ():
                if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
                    value = next((part[k] for k in ("image", "path", "url") if part.get(k)), None)
                    own += [] if value is None else [value]
        found.append(own)
    return found


def _matching(messages: list[Message], count: int) -> list[Message]:
    """The messages, if they have as many places for pictures as there are pictures."""
    places = sum(
        part["type"] == "image"
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
    )
    if places and not count:
        raise _Fault(f"its text has {places} places for images, but the record names no image")
    if places != count:
        raise _Fault(f"its text has {places} places for images, and the record has {count} images")
    return messages


# ------------------------------------------------------------------ conversations

_Columns = tuple[dict[str, list[Any]], dict[int, str]]


def _each(table: Table, make: Callable[[int], dict[str, Any]], names: Sequence[str]) -> _Columns:
    columns: dict[str, list[Any]] = {name: [] for name in names}
    faults: dict[int, str] = {}
    for row in range(table.size):
        made: dict[str, Any] = {}
        if row not in table.faults:
            try:
                made = make(row)
            except _Fault as fault:
                faults[row] = str(fault)
        for name in names:
            columns[name].append(made.get(name))
    return columns, faults


def _llava(table: Table, spec: DataSpec, count: Callable[[int], int]) -> _Columns:
    turns = _needed(table, spec, "conversations", "the conversations of LLaVA's JSON")

    def make(row: int) -> dict[str, Any]:
        messages = [
            _message(turn, "from", "value", split=True) for turn in _turns(turns[row], "from")
        ]
        return {"messages": _checked(_matching(messages, count(row)))}

    return _each(table, make, ["messages"])


def _chat(table: Table, spec: DataSpec, count: Callable[[int], int]) -> _Columns:
    turns = _needed(table, spec, "messages", "chat messages")

    def make(row: int) -> dict[str, Any]:
        # A text may speak of "<image>" without meaning one; where the record has pictures it means them.
        split = count(row) > 0
        messages = [_message(turn, "role", "content", split) for turn in _turns(turns[row], "role")]
        return {"messages": _checked(_matching(messages, count(row)))}

    return _each(table, make, ["messages"])


def _needed(table: Table, spec: DataSpec, column: str, what: str) -> Sequence[Any]:
    if column not in table.columns:
        raise DataError(
            f"{spec}: has no column {column!r} with {what}; its columns are {', '.join(table.names)}. "
            f"Is it of another format than {spec.format!r}?"
        )
    return table.columns[column]


def _turns(stored: Any, key: str) -> Sequence[Mapping[str, Any]]:
    found = _unpacked(stored)
    if not isinstance(found, (list, tuple)) or not found:
        raise _Fault("holds no message")
    for turn in found:
        if not isinstance(turn, Mapping) or key not in turn:
            raise _Fault(f"holds a message without {key!r}")
    return found


def _message(turn: Mapping[str, Any], role_key: str, content_key: str, split: bool) -> Message:
    role = _ROLES.get(str(turn[role_key]))
    if role is None:
        raise _Fault(f"has the role {turn[role_key]!r}; known are {', '.join(_ROLES)}")
    stored = turn.get(content_key)
    if stored is None:
        raise _Fault(f"has a message without {content_key!r}")
    parts: list[dict[str, Any]] = []
    for part in stored if isinstance(stored, (list, tuple)) else [stored]:
        if isinstance(part, str):
            parts += _split(part) if split else [{"type": "text", "text": part}]
        elif isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            parts.append({"type": "image"})
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise _Fault(f"has a part that is neither text nor image: {part!r:.80}")
    if any(part["type"] == "image" for part in parts):
        return {"role": role, "content": parts}
    return {"role": role, "content": "".join(part["text"] for part in parts)}


def _split(text: str) -> list[dict[str, Any]]:
    """Text with `<image>` as parts; the line break beside a placeholder goes, as templates write their own."""
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(text.split(PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip() if PLACEHOLDER in text else piece})
    return parts or [{"type": "text", "text": text}]


def _checked(messages: list[Message]) -> list[Message]:
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant" and isinstance(content, str) and not content.strip():
            raise _Fault("has an empty answer")
        if message["role"] == "assistant" and isinstance(content, list):
            raise _Fault("has an image in an answer")
    return messages


# ------------------------------------------------------------------ questions

_QUESTION = ("question", "query", "prompt", "instruction", "problem")
_TARGET = ("multiple_choice_answer", "answer", "answerKey", "response", "output", "solution")
_REFERENCES = ("answers", "answer_list", "references")
_CHOICES = ("choices", "options")


def _qa(table: Table, spec: DataSpec, count: Callable[[int], int]) -> _Columns:
    names = list(table.columns)
    question = _asked(spec.question, _QUESTION, names, spec, "question")
    if question is None:
        raise DataError(
            f"{spec}: has no question column; its columns are {', '.join(table.names)}: "
            "name it with question: (a column, or a sentence such as '{context}')"
        )
    target = references = choices = None
    if spec.answer is not None:
        asked = "auto" if spec.answer == "auto" else spec.answer
        target = _asked(asked, _TARGET, names, spec, "answer")
        if spec.answer == "auto":
            references = next((name for name in _REFERENCES if name in names), None)
            choices = next((name for name in _CHOICES if name in names), None)
    aliases = "aliases" if spec.answer == "auto" and "aliases" in names else None

    def make(row: int) -> dict[str, Any]:
        values = {name: column[row] for name, column in table.columns.items()}
        asked = _filled(question, values)
        if not isinstance(asked, str) or not asked.strip():
            raise _Fault("has an empty question")
        made: dict[str, Any] = {"question": asked}
        given = None if target is None else _filled(target, values)
        if choices is not None and values[choices] is not None:
            made["choices"], made["choice"] = _choice(values[choices], given)
            answers = [made["choices"][made["choice"]]]
        else:
            answers = _answers(given)
            known = [] if references is None else _answers(values[references])
            if known:  # what is to be learnt comes first; it is one of the references, not one more
                first = answers[:1]
                if first and first[0] in known:
                    known.remove(first[0])
                answers = first + known
            more = [] if aliases is None else _answers(values[aliases])
            answers += [alias for alias in dict.fromkeys(more) if alias not in answers]
        if (target or references) and (not answers or not answers[0].strip()):
            raise _Fault("has an empty answer")
        pictures = count(row)
        content: Any = asked
        if pictures:
            places = [{"type": "image"} for _ in range(pictures)]
            content = [*places, {"type": "text", "text": asked}]
        made["messages"] = [{"role": "user", "content": content}]
        if answers:
            made["answers"] = answers
            made["messages"].append({"role": "assistant", "content": answers[0]})
        return made

    names = ["messages", "question", "answers"] + (["choices", "choice"] if choices else [])
    return _each(table, make, names)


def _asked(
    asked: str, usual: Sequence[str], names: Sequence[str], spec: DataSpec, what: str
) -> str | None:
    """A column or a format string over the columns."""
    if asked == "auto":
        return next((name for name in usual if name in names), None)
    if "{" not in asked and asked not in names:
        raise UnknownNameError(f"{what} column of {spec}", asked, names)
    return asked


def _filled(asked: str, values: Mapping[str, Any]) -> Any:
    if "{" not in asked:
        return values[asked]
    try:
        return asked.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(
            f"{asked!r}: cannot be filled in ({error}); the columns are {', '.join(sorted(values))}"
        ) from error


def _answers(stored: Any) -> list[str]:
    """Answers from a string, a number, a list of those or of VQA's {"answer": ...}, or TriviaQA's {"value", "aliases"}."""
    if stored is None:
        return []
    if isinstance(stored, Mapping):
        if "answer" in stored:
            return _answers(stored["answer"])
        return list(
            dict.fromkeys([*_answers(stored.get("value")), *_answers(stored.get("aliases"))])
        )
    if isinstance(stored, (list, tuple)):
        return [answer for item in stored for answer in _answers(item)]
    if isinstance(stored, bool):
        return ["yes" if stored else "no"]
    return [str(stored)]


def _choice(stored: Any, given: Any) -> tuple[list[str], int]:
    """The choices and the index of the right one, given as a number, a letter, a label or its text."""
    labels: list[str] = []
    if isinstance(stored, Mapping):  # ARC's {"text": [...], "label": [...]}
        labels, stored = [str(label) for label in stored.get("label", ())], stored.get("text")
    if not isinstance(stored, (list, tuple)) or len(stored) < 2:
        raise _Fault("has fewer than two choices")
    choices = [str(choice) for choice in stored]
    if any(not choice.strip() for choice in choices):
        raise _Fault("has an empty choice")
    if isinstance(given, int) and not isinstance(given, bool):
        right = given
    else:
        text = str(given).strip()
        letters = [chr(ord("A") + index) for index in range(len(choices))]
        right = next(
            (known.index(text) for known in (labels, choices, letters) if text in known), -1
        )
        if right < 0 and re.fullmatch(r"\d+", text):
            right = int(text)
    if not 0 <= right < len(choices):
        raise _Fault(f"has the answer {given!r}, which is none of its {len(choices)} choices")
    return choices, right


def _expanded(table: Table, spec: DataSpec) -> Table:
    """One row for each of the questions that a row holds."""
    column = spec.expand
    if column == "auto":
        column = "qa_json" if "qa_json" in table.columns else None
    if column is None:
        return table
    if column not in table.columns:
        raise UnknownNameError(f"column of {spec} to expand", column, table.columns)
    parents: list[int] = []
    items: list[Mapping[str, Any]] = []
    faults: dict[int, str] = {}
    places: list[int] = []
    for row, stored in enumerate(table.columns[column]):
        found = _unpacked(stored)
        good = isinstance(found, (list, tuple)) and all(isinstance(i, Mapping) for i in found)
        if not good or not found:
            faults[len(parents)] = f"its {column} holds no list of questions"
            found = [{}]
        for number, item in enumerate(found):
            parents.append(row)
            items.append(item)
            places.append(number)
    own = dict.fromkeys(name for item in items for name in item)
    rest = {name: values for name, values in table.columns.items() if name != column}
    columns = {name: [values[row] for row in parents] for name, values in rest.items()}
    columns |= {name: [item.get(name) for item in items] for name in own}
    return _made_of(table, parents, columns, faults, lambda row: f"question {places[row]}")


# ------------------------------------------------------------------ documents


def _documents(table: Table, spec: DataSpec) -> Table:
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
        for number, piece in enumerate(_pieces(stored, spec.chunk)):
            parents.append(row)
            texts.append(piece)
            places.append(number)
    rest = {name: values for name, values in table.columns.items() if name != column}
    columns = {name: [values[row] for row in parents] for name, values in rest.items()}
    told = (lambda row: "") if spec.chunk is None else (lambda row: f"piece {places[row]}")
    made = _made_of(table, parents, {**columns, column: texts, "text": texts}, faults, told)
    return replace(made, images={})


def _pieces(text: str, words: int | None) -> Iterable[str]:
    if words is None or not text:
        return [text]
    starts = [0, *(match.start() for match in re.finditer(r"(?<=\s)\S", text))]
    if text[:1].isspace() and len(starts) > 1:
        starts = [0, *starts[2:]]  # white space before the first word is no word
    cuts = [*starts[::words], len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


# ------------------------------------------------------------------ shared


def _made_of(
    table: Table,
    parents: list[int],
    columns: dict[str, list[Any]],
    faults: dict[int, str],
    told: Callable[[int], str],
) -> Table:
    """A table whose row i is made of row `parents[i]` of `table`."""

    def image(get: Callable[[int], Any]) -> Callable[[int], Any]:
        return lambda row: get(parents[row])

    def place(row: int) -> str:
        return ", ".join(part for part in (table.place(parents[row]), told(row)) if part)

    return replace(
        table,
        size=len(parents),
        columns=columns,
        images={name: image(get) for name, get in table.images.items()},
        place=place,
        parents=parents,
        faults=faults,
    )


def _unpacked(stored: Any) -> Any:
    """A value that may be written as JSON."""
    if not isinstance(stored, str):
        return stored
    try:
        return json.loads(stored)
    except (ValueError, RecursionError):
        return None


FORMATS: dict[str, Callable[[Table, DataSpec, Callable[[int], int]], _Columns]] = {
    "llava": _llava,
    "chat": _chat,
    "qa": _qa,
}
"""Formats of conversations; "text" makes documents."""
