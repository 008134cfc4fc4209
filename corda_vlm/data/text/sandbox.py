"""Renders chat templates, in a process of its own: one that never ends or fills the memory ends that process alone.

Templates come with models from anywhere, and Jinja can loop, recurse and multiply. Limits within one process leak: a
single `'a' * 10**10` or the comparison of two lists of lists is not interrupted by anything but the system.

`corda_vlm.data.text.rendering` starts it and talks with it in lines of JSON. It imports nothing of the package, which would
take seconds. The names that templates may use are those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %}`, with which some templates mark answers; what is within is written as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        """As transformers has it: Jinja's own escapes what HTML would."""
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return made


def rendered(template: Template, variables: dict[str, Any], most: int) -> dict[str, Any]:
    """{"text": ...}, or {"error": what kind, "detail": the message} for a template that gives none."""
    pieces, size = [], 0
    for piece in template.generate(**variables):
        size += len(piece)
        if size > most:
            return {"error": "long", "detail": f"{most:,}"}
        pieces.append(piece)
    return {"text": "".join(pieces)}


def answer(request: dict[str, Any], known: dict[str, Template]) -> dict[str, Any]:
    """What is said to one request. Templates are sent once and then go by their names."""
    try:
        if "source" in request:
            known[request["name"]] = environment().from_string(request["source"])
        return rendered(known[request["name"]], request["variables"], request["most"])
    except TemplateSyntaxError as error:
        return {"error": "syntax", "detail": f"{error.message}, line {error.lineno}"}
    except MemoryError:
        return {"error": "memory", "detail": ""}
    except RecursionError:
        return {"error": "deep", "detail": ""}
    except Exception as error:  # of the template's own making
        return {"error": "refused", "detail": f"{error}"[:1000] or type(error).__name__}


def main(seconds: float, memory: int) -> None:
    """Answer until nobody asks any more.

    Args:
        seconds: of processor time for one text; then the system ends this process, whatever it does.
        memory: bytes of address space.
    """
    with suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    timed = hasattr(signal, "setitimer")
    known: dict[str, Template] = {}
    sys.stdout.buffer.write(b"{}\n")  # ready
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, seconds)
        said = json.dumps(answer(json.loads(line), known)).encode() + b"\n"
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(said)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[3]), int(sys.argv[4]))
