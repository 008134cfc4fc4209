"""Text for people, and how each kind of page takes it: names come from users, and are shown as they are, never obeyed.

Text is plain wherever it is made; what is to stand out is wrapped by `bold` or `code`. Each kind of page has one function
that writes such text out, and escapes everything else that the page would take for its own language.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from urllib.parse import quote

# Unicode's noncharacters, which no text holds, as marks of our own.
_BOLD, _END_BOLD, _CODE, _END_CODE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKED = re.compile(
    f"{_BOLD}([^{_BOLD}-{_END_CODE}]*){_END_BOLD}|{_CODE}([^{_BOLD}-{_END_CODE}]*){_END_CODE}"
)
# They turn the direction of what follows, and so can make one name look like another.
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")


def bold(text: str) -> str:
    """Text that stands out."""
    return f"{_BOLD}{printable(text)}{_END_BOLD}"


def code(text: str) -> str:
    """Text as somebody types it."""
    return f"{_CODE}{printable(text)}{_END_CODE}"


def printable(text: str) -> str:
    """Text on one line: white space becomes a space, and what does not print or would turn the text becomes "�"."""
    return " ".join(_shown(text).split())


def shortened(text: str, most: int = 40) -> str:
    """A name that fits into a picture: its beginning and its end."""
    text = printable(text)
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"


def terminal(text: str) -> str:
    """For a terminal, and wherever else nothing stands out."""
    return _written(text, _as_it_is, _as_it_is, _as_it_is)


def markdown(text: str, cell: bool = False) -> str:
    """For GitHub's Markdown; `cell` within a table.

    What stands between backticks is not escaped there, but for the bar that would end a cell.
    """

    def as_code(inner: str) -> str:
        fence = "`" * (1 + max(map(len, re.findall("`+", inner)), default=0))
        space = " " if inner[:1] == "`" or inner[-1:] == "`" else ""
        inner = inner.replace("|", "\\|") if cell else inner
        return f"{fence}{space}{inner}{space}{fence}"

    written = _written(text, _escaped, lambda inner: f"**{_escaped(inner)}**", as_code)
    # At the start of a paragraph these would make a list or a quotation of it.
    return re.sub(r"^([-+](?=\s|$)|>|\d+(?=[.)](?:\s|$)))", _after_backslash, written)


def page(text: str) -> str:
    """For HTML, between tags or as the value of an attribute in quotes (of text in which nothing stands out)."""
    return _written(
        text,
        _entities,
        lambda inner: f"<strong>{_entities(inner)}</strong>",
        lambda inner: f"<code>{_entities(inner)}</code>",
    )


def link(path: str) -> str:
    """A relative path as the target of a link."""
    return quote(path.encode("utf-8", "surrogateescape"))


# ------------------------------------------------------------------ what the pages share

_Writer = Callable[[str], str]


def _written(text: str, plain: _Writer, bolded: _Writer, coded: _Writer) -> str:
    """Each stretch of text by its writer."""
    pieces, at = [], 0
    for mark in _MARKED.finditer(text):
        pieces.append(plain(_shown(text[at : mark.start()])))
        strong, typed = mark.groups()
        pieces.append(bolded(strong) if strong is not None else coded(typed))
        at = mark.end()
    return "".join([*pieces, plain(_shown(text[at:]))])


def _as_it_is(text: str) -> str:
    return text


def _entities(text: str) -> str:
    return html.escape(text, quote=True)


def _escaped(text: str) -> str:
    """Nothing in it is Markdown any more: emphasis, code, links, HTML, entities, cells, formulas, emoji by name."""
    text = re.sub(r"[\\`*_\[\]<|~$#]", _after_backslash, text)
    return re.sub(r"&(?=#?\w+;)|:(?=[\w+-]+:)", _after_backslash, text)


def _after_backslash(match: re.Match[str]) -> str:
    # A number at the start is followed by what makes a list of it.
    return f"{match[0]}\\" if match[0].isdigit() else f"\\{match[0]}"


def _shown(text: str) -> str:
    return "".join(" " if c.isspace() else "\ufffd" if _is_hidden(c) else c for c in text)


def _is_hidden(c: str) -> bool:
    """Does this character not print, or turn what follows?"""
    nothing = "\ufdd0" <= c <= "\ufdef" or ord(c) & 0xFFFE == 0xFFFE
    return nothing or c in _TURNS or unicodedata.category(c) in ("Cc", "Cs")
