"""Files damaged as disks, editors and other tools damage them; a number gives the same damage every time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import yaml

Mutator = Callable[[bytes, random.Random], bytes]

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, -(2**63), 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "x", "nan",
    "../../x", "\0", "é" * 300, "x" * 5000, "{}", "{0.__class__}", "%s", [], [None], [[]], [1, "x"], {}, {"x": None},
    {"": {}}, [0] * 1000,
)  # fmt: skip


def damaged(content: bytes, name: str, chance: random.Random) -> bytes:
    """`content` with one thing wrong that suits the format its name tells."""
    kinds: list[Mutator] = [_flip, _cut, _zeros, _insert, _repeat, _drop, _replace_all]
    if name.endswith((".json", ".yaml", ".jsonl")):
        kinds = [_structure] * 6 + kinds
    elif name.endswith(".safetensors"):
        kinds = [_header] * 4 + [_values] * 3 + kinds
    return chance.choice(kinds)(content, chance)


# ------------------------------------------------------------------ bytes


def _flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _zeros(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    length = min(chance.choice((4, 64, 4096)), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def _insert(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    strange = (
        b"\xff\xfe",
        b"\0",
        b"{",
        b"]",
        b'"',
        b"\n",
        b": ",
        b"&a [*a]",
        b"!!python/name:os.system",
        b"- ",
        b"\xf0\x9f",
    )
    return content[:at] + chance.choice(strange) + content[at:]


def _repeat(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    part = content[start : start + chance.choice((1, 16, 256))]
    return content[:start] + part * chance.choice((2, 100)) + content[start:]


def _drop(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    return content[:start] + content[start + chance.choice((1, 7, 100)) :]


def _replace_all(content: bytes, chance: random.Random) -> bytes:
    others = (
        b"",
        b"\0" * 100,
        b"{}",
        b"[]",
        b"null",
        b"[" * 100_000,
        b"\xff" * 50,
        b"PK\x03\x04",
        b"a: b",
        b"- 1",
        b"1",
    )
    return chance.choice(others)


# ------------------------------------------------------------------ structures


def _structure(content: bytes, chance: random.Random) -> bytes:
    """JSON, JSON lines or YAML in which one value is of another kind, gone, twice there or under another name."""
    text = content.decode()
    lines = text.splitlines()
    try:
        return json.dumps(_changed(json.loads(text), chance)).encode()
    except ValueError:
        pass
    try:
        number = chance.randrange(len(lines))
        lines[number] = json.dumps(_changed(json.loads(lines[number]), chance))
        return ("\n".join(lines) + "\n").encode()
    except ValueError:
        return yaml.safe_dump(_changed(yaml.safe_load(text), chance), sort_keys=False).encode()


def _changed(value: Any, chance: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = (
            node.items()
            if isinstance(node, dict)
            else enumerate(node)
            if isinstance(node, list)
            else ()
        )
        for key, item in items:
            places.append((node, key))
            walk(item)

    walk(value)
    if not places or chance.random() < 0.03:
        return chance.choice(STRANGE)
    node, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[f"{key}{chance.choice(('x', ' ', 'é'))}"] = node.pop(key)
    elif kind == 2 and isinstance(node, list):
        node.append(node[key])
    elif kind == 3 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
        node[key] = chance.choice(
            (-node[key], node[key] + 1, node[key] * 1000, str(node[key]), [node[key]])
        )
    else:
        node[key] = chance.choice(STRANGE)
    return value


# ------------------------------------------------------------------ safetensors


def _header(content: bytes, chance: random.Random) -> bytes:
    """The JSON of the header changed, its length put right."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except ValueError:
        return _flip(content, chance)
    if chance.random() < 0.3 and "__metadata__" in header:
        header["__metadata__"] = {
            name: _text(text, chance) for name, text in header["__metadata__"].items()
        }
    else:
        header = _changed(header, chance)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _text(text: str, chance: random.Random) -> str:
    try:
        return json.dumps(_changed(json.loads(text), chance))
    except ValueError:
        return chance.choice((text + "x", "", text.upper()))


def _values(content: bytes, chance: random.Random) -> bytes:
    """Numbers of the tensors changed: what only a checksum notices."""
    start = 8 + int.from_bytes(content[:8], "little")
    if start >= len(content):
        return _flip(content, chance)
    at = chance.randrange(start, len(content))
    new = chance.choice((b"\0\0\xc0\x7f", b"\0" * 64, b"\xff" * 4, bytes([content[at] ^ 1])))[
        : len(content) - at
    ]
    return content[:at] + new + content[at + len(new) :]
