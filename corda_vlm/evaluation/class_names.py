"""Class names and prompt templates: from the suite, from a file, from open_clip, or from the data itself.

A wrong order of classes gives plausible numbers, so labels are matched by the data set's own class names
wherever it has them, and counts are checked where it has not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_vlm.errors import CordaError, DataError, brief
from corda_vlm.evaluation.shipped import find_shipped
from corda_vlm.names import quoted
from corda_vlm.yaml_file import read_small_text, read_yaml

OPENAI = "openai_imagenet"
SIMPLE = "simple_imagenet"

DEFAULT_TEMPLATES = ("a photo of a {}.",)
"""The prompts where none are named."""


@dataclass(frozen=True)
class ClassNames:
    """The classes of a task.

    Attributes:
        names: as the prompts say them.
        remap: for each label of the data its index in `names`; None where the two are the same.
    """

    names: tuple[str, ...]
    remap: tuple[int, ...] | None = None


def load_templates(source: str | Sequence[str], beside: Path | None = None) -> tuple[str, ...]:
    """Prompt templates: a list, "openai_imagenet" (80), "simple_imagenet" (7), or a file with one a line.

    Raises:
        UnknownNameError: no such list or file.
        CordaError: a template without exactly one `{}`, or none at all.
    """
    if not isinstance(source, str):
        templates = [str(template) for template in source]
    elif source in (OPENAI, SIMPLE):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        chosen = OPENAI_IMAGENET_TEMPLATES if source == OPENAI else SIMPLE_IMAGENET_TEMPLATES
        templates = [template("{}") for template in chosen]
    else:
        lines = find_shipped(source, "templates/*.txt", "template list", (OPENAI, SIMPLE), beside)
        templates = [line.strip() for line in read_small_text(lines).splitlines()]
        templates = [line for line in templates if line and not line.startswith("#")]
    for template in templates:
        if template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
            raise CordaError(
                f"template {brief(template)} must have one {{}} where the class name goes, and no other brace"
            )
        if not template.isprintable():
            raise CordaError(
                f"template {brief(template)} holds what does not print; give plain text"
            )
    if not templates:
        raise CordaError(
            f"no templates in {source!r}; give at least one, e.g. 'a photo of a {{}}.'"
        )
    return tuple(templates)


def load_class_names(source: str, beside: Path | None = None) -> tuple[str, ...] | dict[str, str]:
    """A list in the order of the labels, or a mapping from the data set's own names to those of the prompts.

    Raises:
        UnknownNameError: neither "openai_imagenet" nor a file of eval/class_names nor a path.
        CordaError: the file is neither a list nor a mapping of names.
    """
    if source == OPENAI:
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    path = find_shipped(source, "class_names/*.yaml", "class names", (OPENAI,), beside)
    names = read_yaml(path)
    if isinstance(names, Mapping) and names:
        return {_named(own, path): _named(name, path) for own, name in names.items()}
    if isinstance(names, Sequence) and not isinstance(names, str) and names:
        return tuple(_named(name, path) for name in names)
    raise CordaError(
        f"{path} must hold a list of class names, or a mapping 'own name: name in the prompt'"
    )


def _named(name: Any, path: Path) -> str:
    """A class name as text. YAML makes truth values of yes and no, dates of dates, and nothing of an empty item."""
    if not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
        raise CordaError(f"{path}: {brief(name)} is no class name; write names as text, in quotes")
    return str(name)


def match_class_names(
    wanted: Sequence[str] | Mapping[str, str],
    own: Sequence[Any] | None,
    *,
    count: int | None = None,
    in_order: bool = False,
    what: str = "the data",
) -> ClassNames:
    """Bring the data's labels and the names of the prompts together.

    Args:
        wanted: a list in the order of the labels, or a mapping own name -> name in the prompt.
        own: the data's own class names in the order of its labels, or None if it has none.
        count: how many classes there should be.
        in_order: `wanted` is known to be in the order of the labels, whatever the data calls its classes.
        what: names the task in messages.

    Raises:
        DataError: another number of classes, or a class of the data without a name.
    """
    names = tuple(wanted.values() if isinstance(wanted, Mapping) else wanted)
    keys = tuple(wanted)
    if count is not None and len(names) != count:
        raise DataError(f"{what}: {len(names)} class names, but the suite says {count} classes")
    if own is None:
        return ClassNames(names)
    own = [
        " ".join(map(str, name)) if isinstance(name, (list, tuple)) else str(name) for name in own
    ]
    known = {_plain(key) for key in keys}
    by_name = not in_order and (
        isinstance(wanted, Mapping) or all(_plain(name) in known for name in own)
    )
    if not by_name:
        if len(own) != len(names):
            raise DataError(
                f"{what}: the data has {len(own)} classes ({quoted(own, 6)}) but {len(names)} names are given "
                f"({quoted(names, 6)}); name each class of the data, in the order of its labels"
            )
        return ClassNames(names)
    remap = _indices(keys, own, what)
    return ClassNames(names, None if remap == list(range(len(names))) else tuple(remap))


def _indices(keys: Sequence[str], own: Sequence[str], what: str) -> list[int]:
    """For each of the data's own names the index of its key: the same, or the only one that is the same in `_plain`."""
    exact = {key: index for index, key in enumerate(keys)}
    loose: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        loose.setdefault(_plain(key), []).append(index)
    remap, absent = [], []
    for name in own:
        near = loose.get(_plain(name), [])
        if name in exact:
            remap.append(exact[name])
        elif len(near) == 1:
            remap.append(near[0])
        else:
            absent.append(name)
    if absent:
        raise DataError(
            f"{what}: {len(absent)} of the data's {len(own)} classes have no name among the {len(keys)} "
            f"given: {quoted(absent, 6)}; add them, or use the data that the names belong to"
        )
    return remap


def _plain(name: str) -> str:
    """A name without case, spaces and punctuation: `polka_dotted`, `polka-dotted` and `Polka dotted` are one.

    A name of punctuation alone keeps it.
    """
    return re.sub(r"[\W_]+", "", name.casefold()) or name
