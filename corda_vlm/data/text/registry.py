"""The formats by name: what a row of a source means for a model that generates text.

What stands here is all that the rest of the package knows of a format: a new one is a function that makes conversations of
rows, and a line here. The functions are imported when one is called, so that to know their names takes little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corda_vlm.lazy import later

if TYPE_CHECKING:
    from corda_vlm.data.sources.table import Table
    from corda_vlm.data.spec import DataSpec
    from corda_vlm.data.text.rows import Columns


@dataclass(frozen=True)
class Format:
    """What rows mean.

    Attributes:
        talk: (the table, the spec, how many pictures a row has) -> the columns of its conversations; None: a row is a
            document.
        rows: makes the table whose rows are the records of one whose rows hold several; None where each row is one.
        columns: those by which the format is known; none where it goes by usual names.
        turn: the keys of who says something in a message, and of what.
        inline: messages may name their pictures themselves.
        tools: a column `tools` describes what messages may call.
    """

    talk: Callable[[Table, DataSpec, Callable[[int], int]], Columns] | None
    rows: Callable[[Table, DataSpec], Table] | None = None
    columns: tuple[str, ...] = ()
    turn: tuple[str, str] = ("role", "content")
    inline: bool = False
    tools: bool = False


def _here(module: str, name: str) -> Callable[..., Any]:
    """A function of a module beside this one, imported when it is called."""
    return later(f"corda_vlm.data.text.{module}", name)


FORMATS: dict[str, Format] = {
    "llava": Format(_here("messages", "llava"), columns=("conversations",), turn=("from", "value")),
    "sharegpt": Format(
        _here("messages", "sharegpt"),
        columns=("conversations",),
        turn=("from", "value"),
        inline=True,
        tools=True,
    ),
    "chat": Format(_here("messages", "chat"), columns=("messages",), inline=True, tools=True),
    "qa": Format(_here("questions", "qa"), rows=_here("questions", "expanded")),
    "alpaca": Format(_here("alpaca", "alpaca"), columns=("instruction", "output")),
    "prompt_completion": Format(
        _here("alpaca", "prompt_completion"),
        columns=("prompt", "completion"),
        inline=True,
        tools=True,
    ),
    "preference": Format(
        _here("alpaca", "preference"), columns=("chosen", "rejected"), inline=True, tools=True
    ),
    "text": Format(None, rows=_here("documents", "documents")),
}

_USUAL = {
    ("query", "response"): "format: alpaca, question: query, answer: response",
    ("question", "answer"): "format: qa",
    ("question", "answers"): "format: qa",
}
"""What to write where columns have these names, which are no format's own."""


def written_as(names: Iterable[str]) -> str | None:
    """What to write in a spec whose source has columns of these names: e.g. "format: alpaca". None where no format is seen."""
    have = set(names)
    own = [
        f"format: {name}"
        for name, known in FORMATS.items()
        if known.columns and have.issuperset(known.columns)
    ]
    more = [line for columns, line in _USUAL.items() if have.issuperset(columns)]
    return " or ".join(own or more[:1]) or None
