"""From the words of a command to the arguments of a typed function, and the help that its docstring gives.

An argument without a default is given by its place, others as `--name VALUE` or `--name=VALUE`; a truth value needs no
VALUE, and a list is given item by item or as a list in YAML. Nothing of a command names code to be imported.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from corda_vlm.errors import CordaError, UnknownNameError, brief
from corda_vlm.options import fitted
from corda_vlm.yaml_file import parse_yaml

Verb = Callable[..., None]
HELP = ("-h", "--help")
_TRUTH = {"true": True, "false": False}


def call(verbs: Mapping[str, Verb], words: Sequence[str], about: str) -> None:
    """Call the verb that `words` begin with, or print its help, or that of all.

    Raises:
        UnknownNameError: no such verb, option or choice.
        CordaError: a value that cannot be, one that is missing, or one too many.
    """
    if not words or words[0] in HELP:
        print(_help_of_all(verbs, about))
        return
    if words[0] not in verbs:
        raise UnknownNameError("verb", words[0], verbs, "corda-vlm --help says what they do.")
    verb = verbs[words[0]]
    if any(word in HELP for word in words[1:]):
        print(_help(verb))
        return
    verb(**arguments(verb, words[1:]))


def arguments(verb: Verb, words: Sequence[str]) -> dict[str, Any]:
    """What `words` stand for, by the names of the function's arguments; raises as `call`."""
    parameters = {one.option: one for one in _parameters(verb)}
    positional = [one for one in parameters.values() if one.required]
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if not positional:
                raise CordaError(
                    f"{brief(word)} is one word too many for corda-vlm {verb.__name__}; "
                    f"{_usage(verb)}"
                )
            one = positional.pop(0)
            found[one.name] = one.read(word)
            continue
        option, equals, value = word.partition("=")
        option = option.replace("_", "-")
        one = parameters.get(option)
        if one is None or one.required:
            options = [name for name, known in parameters.items() if not known.required]
            raise UnknownNameError(f"option of corda-vlm {verb.__name__}", option, options)
        if not equals:
            value = _following(one, rest)
        if one.is_list:
            found.setdefault(one.name, []).extend(_items(option, value))
        elif one.name in found:
            raise CordaError(f"{option} is given twice; give it once")
        else:
            found[one.name] = one.read(value)
    if positional:
        raise CordaError(
            f"corda-vlm {verb.__name__} needs {positional[0].name.upper()}; {_usage(verb)}"
        )
    for one in parameters.values():
        if one.is_list and one.name in found:
            found[one.name] = fitted(found[one.name], one.kind, one.option)
    return found


def _following(one: _Parameter, rest: list[str]) -> str:
    """The value that stands behind an option; a truth value needs none."""
    if one.is_switch:
        return rest.pop(0) if rest and rest[0].lower() in one.words else "true"
    if not rest or rest[0].startswith("--"):
        raise CordaError(f"{one.option} needs a value, e.g. {one.option} {one.example}")
    return rest.pop(0)


def _items(option: str, text: str) -> list[Any]:
    """A list in YAML, else the text as its only item."""
    if not text.startswith("["):
        return [text]
    try:
        parse_yaml(text)  # for its bounds
        return yaml.load(text, Loader=yaml.BaseLoader)  # every item as it is written
    except (CordaError, yaml.YAMLError):
        raise CordaError(
            f"{option} {brief(text)} is not a list in YAML; give each item by itself ({option} ONE {option} TWO), or "
            'items with brackets in quotes: ["seeds=[0, 1]", rank=8]'
        ) from None


# ------------------------------------------------------------------ a function's arguments


@dataclass(frozen=True)
class _Parameter:
    name: str
    kind: Any
    default: Any
    help: str

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def kinds(self) -> tuple[Any, ...]:
        return tuple(_alternatives(self.kind))

    @property
    def is_switch(self) -> bool:
        return bool in self.kinds

    @property
    def is_list(self) -> bool:
        return any(get_origin(kind) is list for kind in self.kinds)

    @property
    def words(self) -> tuple[str, ...]:
        """What may be written for it, where that can be counted."""
        choices = [str(word) for kind in self.kinds if get_origin(kind) is Literal for word in get_args(kind)]  # fmt: skip
        return (*_TRUTH, *choices) if self.is_switch else tuple(choices)

    @property
    def example(self) -> str:
        return self.words[0] if self.words else self.name.upper()

    def read(self, text: str) -> Any:
        """The value that `text` stands for."""
        kinds = self.kinds
        value: Any = text
        if type(None) in kinds and str not in kinds and text == "null":
            value = None
        elif self.is_switch:
            value = _TRUTH.get(text.lower(), text)
        elif any(get_origin(kind) is dict for kind in kinds) and text.lstrip().startswith("{"):
            value = parse_yaml(text, self.option.lstrip("-"))
        elif str not in kinds:
            for number in (int, float):
                if number in kinds and not isinstance(value, (int, float)):
                    value = _number(text, number)
        return fitted(value, self.kind, self.name.upper() if self.required else self.option)


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


def _alternatives(kind: Any) -> list[Any]:
    """The members of a union, without their bounds."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [one for part in get_args(kind) for one in _alternatives(part)]
    return [kind]


def _parameters(verb: Verb) -> list[_Parameter]:
    hints = get_type_hints(verb, include_extras=True)
    told = _told(verb)[1]
    return [
        _Parameter(name, hints[name], parameter.default, told.get(name, ""))
        for name, parameter in inspect.signature(verb).parameters.items()
    ]


def _told(verb: Verb) -> tuple[str, dict[str, str]]:
    """What a docstring says: what the function does, and each of its arguments."""
    about, _, listed = (inspect.getdoc(verb) or "").partition("\n\nArgs:\n")
    found: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(listed).splitlines():
        if line.startswith(" "):
            found[name] += " " + line.strip()
        elif ":" in line:
            name, _, text = line.partition(":")
            found[name] = text.strip()
    return about, found


# ------------------------------------------------------------------ help


def _usage(verb: Verb) -> str:
    places = [one.name.upper() for one in _parameters(verb) if one.required]
    return f"usage: corda-vlm {' '.join([verb.__name__, *places])} [OPTIONS]; --help lists them"


def _help_of_all(verbs: Mapping[str, Verb], about: str) -> str:
    rows = [(name, _told(verb)[0].partition("\n")[0]) for name, verb in verbs.items()]
    return "\n".join(
        ["usage: corda-vlm VERB ...", "", _wrapped(about, ""), "", *_table(rows), "",
         "corda-vlm VERB --help lists the options of a verb."]
    )  # fmt: skip


def _help(verb: Verb) -> str:
    parameters = _parameters(verb)
    about = _wrapped(" ".join(_told(verb)[0].split()), "")
    lines = [_usage(verb).partition(";")[0], "", about, ""]
    lines += _table([(one.name.upper(), one.help) for one in parameters if one.required])
    rows = []
    for one in parameters:
        if not one.required:
            default = (
                "" if one.default is None or one.default is False else f" (default: {one.default})"
            )
            rows.append((f"{one.option}{_shape(one)}", f"{one.help}{default}"))
    return "\n".join([*lines, "", *_table(rows)])


def _shape(one: _Parameter) -> str:
    if one.is_switch and not one.words[2:]:
        return ""
    return " " + ("|".join(one.words) if one.words else one.name.upper())


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    indent = " " * 26
    lines = []
    for name, text in rows:
        told = _wrapped(text, indent)
        head = f"  {name}"
        lines.append(f"{head:<25}{told[25:]}" if len(head) < 25 else f"{head}\n{told}")
    return lines


def _wrapped(text: str, indent: str) -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.fill(
        text, width=max(width, 60), initial_indent=indent, subsequent_indent=indent
    )
