"""YAML as this package reads it: plain values, within bounds, every key once.

YAML can name classes to be made, repeat parts of itself so that a few lines stand for gigabytes, and nest without
end. Files of other people are read here, so none of that is taken.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from corda_vlm.errors import CordaError
from corda_vlm.files import read_text

# The same in C where the package yaml was built with it, some ten times faster.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MOST_BYTES = 10_000_000
MOST_VALUES = 300_000
"""Values of a document once its aliases are written out."""
MOST_LEVELS = 60


# YAML 1.1, which PyYAML reads, makes text of 1e-3: it wants 1.0e-3.
_EXPONENT = re.compile(r"[-+]?(?:\d+|\d*\.\d+|\d+\.)[eE][-+]?\d+\Z")


class _Loader(_SafeLoader):
    """The safe loader, which takes the last of two equal keys without a word, but for that."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                # as it is written: 1 and '1' are two keys
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value[:100]!r} stands here twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str, what: str = "the text") -> Any:
    """The value that a YAML document stands for: mappings, lists, strings, numbers, truth values, dates, None.

    Args:
        what: names the document in messages.

    Raises:
        CordaError: not YAML, a key that stands twice in one mapping, a tag that asks for a class, or a document that is
            too deep or, with its aliases written out, too large.
    """
    try:
        _check_depth(text, what)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node, what)
            return _unshared(loader.construct_document(node))
        finally:
            loader.dispose()
    except CordaError:
        raise
    except (
        Exception
    ) as error:  # of every kind: of `!!int ''` an IndexError, of `!!timestamp x` an AttributeError
        raise CordaError(f"{what} is not YAML: {str(error)[:500]}") from error


def read_yaml(path: str | Path) -> Any:
    """The value that a YAML file holds, see `parse_yaml`.

    Raises:
        CordaError: no regular file that can be read, not UTF-8, above 10 MB, or as of `parse_yaml`.
    """
    return parse_yaml(read_small_text(path), str(path))


def read_small_text(path: str | Path) -> str:
    """The text of a file that people write by hand.

    Raises:
        CordaError: no regular file (a device or a pipe may never end), not UTF-8, above 10 MB, or it cannot be read.
    """
    return read_text(path, "file of text", CordaError, at_most=MOST_BYTES)


def _unshared(value: Any) -> Any:
    """With aliases written out, so that changing one place changes no other."""
    if isinstance(value, dict):
        return {key: _unshared(one) for key, one in value.items()}
    return [_unshared(one) for one in value] if isinstance(value, list) else value


def _check_depth(text: str, what: str) -> None:
    """Before anything is built of it, which goes a level down for each level."""
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MOST_LEVELS:
            raise CordaError(
                f"{what} is nested more than {MOST_LEVELS} levels deep; nothing that is read here is"
            )


def _check_size(root: Any, what: str) -> None:
    """Refuse aliases that multiply: a value counts as often as it is referred to."""
    sizes: dict[int, int] = {}
    open_above: set[int] = set()

    def size(node: Any) -> int:
        if id(node) in open_above:
            raise CordaError(f"{what} has an alias for something that it lies in")
        if (known := sizes.get(id(node))) is not None:
            return known
        total = 1
        if not isinstance(node, yaml.ScalarNode):
            open_above.add(id(node))
            pairs = isinstance(node, yaml.MappingNode)
            for item in node.value:
                total += size(item[0]) + size(item[1]) if pairs else size(item)
            open_above.discard(id(node))
        if total > MOST_VALUES:
            raise CordaError(
                f"{what} holds more than {MOST_VALUES:,} values once its aliases are written out"
            )
        sizes[id(node)] = total
        return total

    size(root)
