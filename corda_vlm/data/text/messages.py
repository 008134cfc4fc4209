"""Conversations: LLaVA's JSON, ShareGPT's, and chat messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from corda_vlm.data.columns import is_empty
from corda_vlm.data.sources.table import Table
from corda_vlm.data.spec import DataSpec
from corda_vlm.data.text.registry import FORMATS, written_as
from corda_vlm.data.text.rows import Columns, Fault, Message, each, not_text, unpacked
from corda_vlm.errors import DataError

PLACEHOLDER = "<image>"
_LEFT_OUT = re.compile(rf"(?m)^(?:{PLACEHOLDER}\s*)+| ?{PLACEHOLDER}")
"""Placeholders with the white space that is theirs: what follows at the start of a line, else the space before."""

_TURNS = (("role", "content"), ("from", "value"))
"""The keys of a message, of which each format takes the other's too."""

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "system": "system", "developer": "system", "tool": "tool",
    "observation": "tool", "tool_response": "tool", "function": "tool",
}  # fmt: skip


_CALLS = ("function_call", "tool_call")
"""The roles of messages whose text is a call of a tool, in LLaMA-Factory's and in ms-swift's data."""


def llava(table: Table, spec: DataSpec, count: Callable[[int], int]) -> Columns:
    """LLaVA's JSON: every `<image>` in a text is the place of a picture."""
    return _conversations(table, spec, count, "conversations", split=lambda row: True)


def sharegpt(table: Table, spec: DataSpec, count: Callable[[int], int]) -> Columns:
    """ShareGPT's conversations, of turns with `from` and `value`."""
    return _conversations(table, spec, count, "conversations", split=lambda row: count(row) > 0)


def chat(table: Table, spec: DataSpec, count: Callable[[int], int]) -> Columns:
    """Chat messages of `role` and `content`, as OpenAI and TRL have them."""
    return _conversations(table, spec, count, "messages", split=lambda row: count(row) > 0)


def _conversations(
    table: Table,
    spec: DataSpec,
    count: Callable[[int], int],
    column: str,
    split: Callable[[int], bool],
) -> Columns:
    """One conversation a row. `split`: does `<image>` in this row's texts stand for a picture?

    A text may speak of "<image>" without meaning one; where the record has pictures it means them. Where pictures are
    left out it is taken for one, so that a model of text alone reads no placeholder.
    """
    turns = needed(table, spec, column)

    def make(row: int) -> dict[str, Any]:
        messages = messages_of(turns[row], spec, split=split(row))
        return {"messages": checked(matching(messages, count(row)))}

    return each(table, make, ["messages"])


def tools_of(stored: Any) -> list[Mapping[str, Any]]:
    """The tools that a conversation may call, of a list of their descriptions or of such a list written as JSON."""
    if is_empty(stored):
        return []
    tools = unpacked(stored)
    if not isinstance(tools, (list, tuple)) or not all(isinstance(one, Mapping) for one in tools):
        raise Fault("names tools that are no list of descriptions")
    return list(tools)


def messages_of(stored: Any, spec: DataSpec, *, split: bool) -> list[Message]:
    """The messages of a list of turns, or of such a list written as JSON."""
    turns = unpacked(stored)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise Fault("holds no message")
    return [_message(turn, spec, split=split) for turn in turns]


def speaker(turn: Mapping[str, Any]) -> str | None:
    """Who says a turn, as templates call them; None of what is no turn."""
    said_by = next((turn[role] for role, _ in _TURNS if role in turn), None)
    return "assistant" if said_by in _CALLS else _ROLES.get(str(said_by))


def needed(table: Table, spec: DataSpec, column: str) -> Sequence[Any]:
    """A column of the format's.

    Raises:
        DataError: it is not there; the message names the formats whose columns are.
    """
    if column in table.columns:
        return table.columns[column]
    line = written_as(table.columns)
    raise DataError(
        f"{spec}: has no column {column!r}, which format: {spec.format} reads; its columns are {', '.join(table.names)}. "
        + (f"Write {line}" if line else f"Is it of another format than {spec.format!r}?")
    )


Part = dict[str, Any]


def _message(turn: Any, spec: DataSpec, *, split: bool) -> Message:
    """A message; `split`: `<image>` in a text is a picture. Pictures and their `<image>` are left out with image: null."""
    usual = FORMATS[str(spec.format)].turn
    other = next(turn for turn in _TURNS if turn != usual)
    if not isinstance(turn, Mapping) or not (usual[0] in turn or other[0] in turn):
        raise Fault(f"holds a message without {usual[0]!r}")
    role_key, content_key = usual if usual[0] in turn else other
    if turn[role_key] in _CALLS:
        return _calling(unpacked(turn.get(content_key)))
    role, without = _ROLES.get(str(turn[role_key])), spec.image is None
    if role is None:
        raise Fault(f"has the role {turn[role_key]!r:.80}; known are {', '.join(_ROLES)}")
    called = turn.get("tool_calls") or turn.get("function_call")
    stored = turn.get(content_key)
    if called:
        if not isinstance(stored, str) and not is_empty(stored):
            raise Fault("has a message that calls tools and shows pictures")
        return {**_calling(called), "content": stored or ""}
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
    shows = any(part["type"] == "image" for part in parts)
    message: Message = {
        "role": role,
        "content": parts if shows else "".join(part["text"] for part in parts),
    }
    message |= {
        key: turn[key] for key in _OF_TOOLS if role == "tool" and isinstance(turn.get(key), str)
    }
    if turn.get("weight") == 0 or turn.get("loss") in (0, False):  # OpenAI's word, and ms-swift's
        message["learn"] = False
    return message


_OF_TOOLS = ("name", "tool_call_id")
"""What the message of a tool says beside its text."""


def _calling(stored: Any) -> Message:
    """An answer that calls tools, as templates take it: with arguments as values, not as JSON in a text. It is not learned."""
    calls = []
    for call in stored if isinstance(stored, (list, tuple)) else [stored]:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Fault(f"has a call of a tool without a name: {call!r:.80}")
        given = function.get("arguments")
        read = unpacked(given)
        arguments = given if read is None else read
        calls.append({"type": "function", "function": {**function, "arguments": arguments or {}}})
    if not calls:
        raise Fault("has a message that calls no tool")
    return {"role": "assistant", "content": "", "tool_calls": calls, "learn": False}


def asks(text: str, pictures: int, spec: DataSpec) -> Message:
    """A question, with the places of its pictures where `<image>` stands in it, else before it."""
    if spec.image is None or not pictures:
        return {"role": "user", "content": bare(text, pictures, spec)}
    if PLACEHOLDER in text:
        return {"role": "user", "content": _split(text)}
    places = [{"type": "image"} for _ in range(pictures)]
    return {"role": "user", "content": [*places, *_as_it_is(text)]}


def bare(text: str, pictures: int, spec: DataSpec) -> str:
    """A text without the `<image>` that stand for the pictures of its record, or for those that are left out."""
    return _without(text) if pictures or spec.image is None else text


def says(text: str, pictures: int, spec: DataSpec) -> Message:
    """An answer, in which no picture has a place."""
    if pictures and PLACEHOLDER in text:
        raise Fault("has an image in an answer")
    return {"role": "assistant", "content": bare(text, pictures, spec)}


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


def with_system(messages: list[Message], stored: Any, column: str) -> list[Message]:
    """The messages after a system text, where there is one."""
    if is_empty(stored):
        return messages
    if not isinstance(stored, str):
        raise not_text(column, stored)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": stored}, *messages]
    if messages[0]["content"] != stored:
        raise Fault(f"its messages begin with another system text than its {column}")
    return messages


def checked(messages: list[Message]) -> list[Message]:
    for message in messages:
        content = message["content"]
        calls = "tool_calls" in message
        if (
            message["role"] == "assistant"
            and isinstance(content, str)
            and not (content.strip() or calls)
        ):
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
