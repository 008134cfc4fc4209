"""What all registries have in common: a plain dict from names to things, and a name stands for one thing."""

from __future__ import annotations

from typing import TypeVar

from corda_vlm.errors import CordaError, brief

Thing = TypeVar("Thing")


def register(registry: dict[str, Thing], kind: str, name: str, thing: Thing) -> Thing:
    """Put `thing` into a registry, and return it; to register the same thing again changes nothing.

    Args:
        kind: says what the registry holds, for the messages, e.g. "method".

    Raises:
        CordaError: the name is no text, or another thing has it.
    """
    if not isinstance(name, str) or not name or not name.isprintable() or name != name.strip():
        raise CordaError(
            f"a {kind} cannot be called {brief(name)}; give it a name of text that people can type"
        )
    if registry.setdefault(name, thing) is not thing:
        raise CordaError(
            f"a {kind} named {name!r} is registered already; give this one another name"
        )
    return thing
