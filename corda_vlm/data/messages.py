"""Conversations: LLaVA's JSON and chat messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from corda_vlm.data.rows import Columns, Fault, Message, each, not_text, unpacked
from corda_vlm.data.spec import DataSpec
from corda_vlm.data.table import Table
from corda_vlm.errors import DataError

PLACEHOLDER = "<image>"
_LEFT_OUT = re.compile(rf"(?m)^(?:{PLACEHOLDER}\s*)+| ?{PLACEHOLDER}")
"""Placeholders with the white space that is theirs: what follows at the start of a line, else the space before."""

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip


def llava(table: Table, spec: DataSpec, count: Callable[[int], int]) -> Columns:
    turns = _needed(table, spec, "conversations", "the conversations of LLaVA's JSON")

    without = spec.image is None

    def make(row: int) -> dict[str, Any]:
        messages = [
            _message(turn, "from", "value", split=True, without=without)
            for turn in _turns(turns[row], "from")
        ]
        return {"messages": _checked(matching(messages, count(row)))}

    return each(table, make, ["messages"])


def chat(table: Table, spec: DataSpec, count: Callable[[int], int]) -> Columns:
    turns = _needed(table, spec, "messages", "chat messages")

    def make(row: int) -> dict[str, Any]:
        # A text may speak of "<image>" without meaning one; where the record has pictures it means them.
        # Where pictures are left out it is taken for one, so that a model of text alone reads no placeholder.
        messages = [
            _message(turn, "role", "content", split=count(row) > 0, without=spec.image is None)
            for turn in _turns(turns[row], "role")
        ]
        return {"messages": _checked(matching(messages, count(row)))}

    return each(table, make, ["messages"])


def _needed(table: Table, spec: DataSpec, column: str, what: str) -> Sequence[Any]:
    if column not in table.columns:
        raise DataError(
            f"{spec}: has no column {column!r} with {what}; its columns are {', '.join(table.names)}. "
            f"Is it of another format than {spec.format!r}?"
        )
    return table.columns[column]


def _turns(stored: Any, key: str) -> Sequence[Mapping[str, Any]]:
    found = unpacked(stored)
    if not isinstance(found, (list, tuple)) or not found:
        raise Fault("holds no message")
    for turn in found:
        if not isinstance(turn, Mapping) or key not in turn:
            raise Fault(f"holds a message without {key!r}")
    return found


Part = dict[str, Any]


def _message(
    turn: Mapping[str, Any], role_key: str, content_key: str, *, split: bool, without: bool
) -> Message:
    """A message; `split`: `<image>` in a text is a picture; `without`: pictures and their `<image>` are left out."""
    role = _ROLES.get(str(turn[role_key]))
    if role is None:
        raise Fault(f"has the role {turn[role_key]!r}; known are {', '.join(_ROLES)}")
    stored = turn.get(content_key)
    if stored is None:
        raise Fault(f"has a message without {content_key!r}")
    if not isinstance(stored, (str, list, tuple, Mapping)):
        raise not_text(content_key, stored)
    parts: list[Part] = []
    for part in stored if isinstance(stored, (list, tuple)) else [stored]:
        if isinstance(part, str):
            parts += _split(part) if split and not without else _as_it_is(part)
        elif isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            parts.append({"type": "image"})
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts += _as_it_is(part["text"])
        else:
            raise Fault(f"has a part that is neither text nor image: {part!r:.80}")
    if without:
        parts = [{**part, "text": _without(part["text"])} for part in parts if "text" in part]
    if any(part["type"] == "image" for part in parts):
        return {"role": role, "content": parts}
    return {"role": role, "content": "".join(part["text"] for part in parts)}


def _as_it_is(text: str) -> list[Part]:
    return [{"type": "text", "text": text}]


def _without(text: str) -> str:
    """Text without `<image>`, for records whose pictures are left out."""
    return _LEFT_OUT.sub("", text).strip() if PLACEHOLDER in text else text


def _split(text: str) -> list[Part]:
    """Text with `<image>` as parts; the line break beside a placeholder goes, as templates write their own."""
    parts: list[Part] = []
    for index, piece in enumerate(text.split(PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip() if PLACEHOLDER in text else piece})
    return parts or _as_it_is(text)


def _checked(messages: list[Message]) -> list[Message]:
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant" and isinstance(content, str) and not content.strip():
            raise Fault("has an empty answer")
        if message["role"] == "assistant" and isinstance(content, list):
            raise Fault("has an image in an answer")
    return messages


def matching(messages: list[Message], count: int) -> list[Message]:
    """The messages, if they have as many places for pictures as there are pictures."""
    places = sum(
        part["type"] == "image"
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
    )
    if places and not count:
        raise Fault(f"its text has {places} places for images, but the record names no image")
    if places != count:
        raise Fault(f"its text has {places} places for images, and the record has {count} images")
    return messages
