"""From the words of a command to the arguments of a typed function: argparse, set up by its signature and docstring.

An argument without a default is given by its place, others as `--name VALUE` or `--name=VALUE`; a truth value needs no
VALUE, and a list is given item by item or as a list in YAML. Nothing of a command names code to be imported.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
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
        _overview(verbs, about).print_help()
        return
    if words[0] not in verbs:
        raise UnknownNameError("verb", words[0], verbs, "corda-vlm --help says what they do.")
    verb = verbs[words[0]]
    parser, arguments = _parser(verb)
    if any(word in HELP for word in words[1:]):
        parser.print_help()
        return
    verb(**_read(parser, arguments, words[1:]))


def _overview(verbs: Mapping[str, Verb], about: str) -> argparse.ArgumentParser:
    more = "corda-vlm VERB --help lists the options of a verb."
    parser = argparse.ArgumentParser("corda-vlm", "%(prog)s VERB ...", about, more, add_help=False)
    listed = parser.add_argument_group("verbs")
    for name, verb in verbs.items():
        listed.add_argument(name, help=_told(verb)[0].partition("\n")[0].replace("%", "%%"))
    return parser


def _parser(verb: Verb) -> tuple[argparse.ArgumentParser, list[_Argument]]:
    """The parser of a verb's words, and what it was made of."""
    about, told = _told(verb)
    parameters = inspect.signature(verb).parameters.values()
    places = [one.name.upper() for one in parameters if one.default is one.empty]
    parser = argparse.ArgumentParser(
        f"corda-vlm {verb.__name__}",
        " ".join(["%(prog)s", *places, "[OPTIONS]"]),
        about,
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # as of Python 3.14: -1e-4 is one too
    hints = get_type_hints(verb, include_extras=True)
    arguments = []
    for one in parameters:
        name = one.name if one.default is one.empty else "--" + one.name.replace("_", "-")
        text = told.get(one.name, "").replace("%", "%%")
        if not (one.default is one.empty or one.default is None or one.default is False):
            text += f" (default: {one.default})"
        arguments.append(
            parser.add_argument(name, action=_Argument, kind=hints[one.name], help=text)
        )
    return parser, arguments


def _read(
    parser: argparse.ArgumentParser, arguments: Sequence[_Argument], words: Sequence[str]
) -> dict[str, Any]:
    """What `words` stand for, by the names of the function's arguments; raises as `call`."""
    options = {one.shown: one for one in arguments if one.option_strings}
    try:
        found, more = parser.parse_known_args(list(_spelled(words, options, parser.prog)))
    except argparse.ArgumentError as error:
        option = error.argument_name or ""
        raise CordaError(f"{option} needs a value: {option} {options[option].metavar}") from None
    usage = f"{parser.format_usage().strip()}; --help lists them"
    if more and more[0].startswith("-"):
        raise UnknownNameError(f"option of {parser.prog}", more[0], options)
    if more:
        raise CordaError(f"{brief(more[0])} is one word too many for {parser.prog}; {usage}")
    for one in arguments:
        if not one.option_strings and one.dest not in found:
            raise CordaError(f"{parser.prog} needs {one.shown}; {usage}")
    return vars(found)


def _spelled(words: Sequence[str], options: Mapping[str, _Argument], prog: str) -> Iterator[str]:
    """The words with options as they are listed, and `=true` behind a switch without a value.

    argparse would take whatever follows a switch for its value, e.g. the file in `--fresh demo.yaml`.
    """
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        option = option.replace("_", "-")
        if not word.startswith("--"):
            yield word
        elif option not in options:
            raise UnknownNameError(f"option of {prog}", option, options)
        elif equals or not options[option].is_switch or following.lower() in options[option].words:
            yield f"{option}{equals}{value}"
        else:
            yield f"{option}=true"


class _Argument(argparse.Action):
    """An argument of a verb, which reads what is written for it as its type and its bounds want it."""

    def __init__(self, option_strings: Sequence[str], dest: str, kind: Any, **rest: Any) -> None:
        self.kind = kind
        self.kinds = _alternatives(kind)
        self.is_switch = bool in self.kinds
        self.words = list(_TRUTH) if self.is_switch else []
        for one in self.kinds:
            self.words += map(str, get_args(one)) if get_origin(one) is Literal else []
        self.shown = option_strings[0] if option_strings else dest.upper()
        rest["required"] = False  # what is missing is told in our words
        rest["nargs"] = "?" if self.is_switch else None
        rest["metavar"] = "|".join(self.words) or dest.upper()
        super().__init__(option_strings, dest, **rest)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if any(get_origin(one) is list for one in self.kinds):
            items = [*getattr(namespace, self.dest, []), *_items(self.shown, values)]
            setattr(namespace, self.dest, fitted(items, self.kind, self.shown))
        elif self.dest in namespace:
            raise CordaError(f"{self.shown} is given twice; give it once")
        else:
            setattr(namespace, self.dest, self.read(values))

    def read(self, text: str) -> Any:
        """The value that `text` stands for."""
        value: Any = text
        if type(None) in self.kinds and str not in self.kinds and text == "null":
            value = None
        elif self.is_switch:
            value = _TRUTH.get(text.lower(), text)
        elif any(get_origin(one) is dict for one in self.kinds) and text.lstrip().startswith("{"):
            value = parse_yaml(text, self.shown.lower().lstrip("-"))
        elif str not in self.kinds:
            for number in (int, float):
                if number in self.kinds and not isinstance(value, (int, float)):
                    value = _number(text, number)
        return fitted(value, self.kind, self.shown)


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
