"""From the words of a command to the arguments of a typed function: argparse, set up by its signature and docstring.

An argument without a default is given by its place, others as `--name VALUE` or `--name=VALUE`; a truth value needs no
VALUE, and a list is given item by item or as a list in YAML. An argument whose type is a class of options stands for all of
its options, each with the help and the default that the class gives it. Nothing of a command names code to be imported.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from inspect import get_annotations
from itertools import zip_longest
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from corda_vlm.errors import CordaError, UnknownNameError, brief
from corda_vlm.options import BY_PLACE, current_name, described, fitted, help_of
from corda_vlm.yaml_file import parse_yaml

Verb = Callable[..., None]
HELP = ("-h", "--help")
_TRUTH = {"true": True, "false": False}
_WIDTH = 100


def call(verbs: Mapping[str, Verb], words: Sequence[str], about: str) -> None:
    """Call the verb that `words` begin with, or print its help, or that of all.

    Raises:
        UnknownNameError: no such verb, option or choice.
        CordaError: a value that cannot be, one that is missing, or one too many.
    """
    if not words or words[0] in HELP:
        print(_overview(verbs, about))
        return
    if words[0] not in verbs:
        raise UnknownNameError("verb", words[0], verbs, "corda-vlm --help says what they do.")
    verb = verbs[words[0]]
    command = Command(words[0], verb)
    if any(word in HELP for word in words[1:]):
        print(command.help())
        return
    verb(**command.read(words[1:]))


def _overview(verbs: Mapping[str, Verb], about: str) -> str:
    listed = dict.fromkeys(verbs.values())
    names = {verb: [name for name in verbs if verbs[name] is verb] for verb in listed}
    width = max(len(of[0]) for of in names.values()) + 2
    lines = [
        f"  {of[0]:{width}}{_parts(verb)[0].partition(chr(10))[0]}" for verb, of in names.items()
    ]
    start = "example: corda-vlm run configs/demo.yaml\n\nusage: corda-vlm VERB ...\n"
    more = "corda-vlm VERB --help begins with an example, and lists the options of a verb."
    return "\n".join([start, textwrap.fill(about, _WIDTH), "", "verbs:", *lines, "", more])


class Command:
    """A verb, as the command line takes it.

    Args:
        name: the word that calls it.
        verb: its function. Parameters whose type is a dataclass stand for the options of that class.
    """

    def __init__(self, name: str, verb: Verb) -> None:
        self.prog = f"corda-vlm {name}"
        self.about, self.example, told = _parts(verb)
        self.kinds: dict[str, type] = {}
        self.parser = argparse.ArgumentParser(
            self.prog,
            argument_default=argparse.SUPPRESS,
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
            formatter_class=lambda prog: argparse.HelpFormatter(
                prog, max_help_position=30, width=_WIDTH
            ),
        )
        # as of Python 3.14: -1e-4 is a negative number too
        self.parser._negative_number_matcher = re.compile(r"-\.?\d")
        self.arguments: list[_Argument] = []
        self.former: dict[str, type] = {}
        places = self.parser.add_argument_group("arguments")
        own = self.parser.add_argument_group("options")
        hints = get_type_hints(verb, include_extras=True)
        for one in inspect.signature(verb).parameters.values():
            kind = hints[one.name]
            if is_dataclass(kind):
                assert isinstance(kind, type)
                self._add_options(one.name, kind)
            elif one.default is one.empty or BY_PLACE in getattr(kind, "__metadata__", ()):
                self._add(places, one.name, kind, told.get(one.name, ""))
            else:
                name = "--" + one.name.replace("_", "-")
                self._add(own, name, kind, told.get(one.name, ""), one.default)
        by_place = [one for one in self.arguments if not one.option_strings]
        words = [f"[{one.shown}]" if one.is_optional else one.shown for one in by_place]
        self.parser.usage = " ".join([self.prog, *words, "[OPTIONS]"])

    def _add_options(self, parameter: str, kind: type) -> None:
        self.kinds[parameter] = kind
        title = (kind.__doc__ or "").partition("\n")[0].rstrip(".")
        group = self.parser.add_argument_group(title[:1].lower() + title[1:])
        hints, helps = get_type_hints(kind, include_extras=True), help_of(kind)
        # a class's own options before those that it shares with others
        for field in sorted(fields(kind), key=lambda one: _distance(kind, one.name)):
            assert field.default is not MISSING, f"{kind.__name__}.{field.name} needs a default"
            if field.init:
                name = "--" + field.name.replace("_", "-")
                self._add(group, name, hints[field.name], helps[field.name], field.default)
        for former in getattr(kind, "FORMER", {}):
            self.former["--" + former.replace("_", "-")] = kind

    def _add(self, group: Any, name: str, kind: Any, text: str, default: Any = None) -> None:
        text = text.replace("%", "%%")
        if not (default is None or default is False or default == ()):
            text += f" (default: {default})"
        self.arguments.append(group.add_argument(name, action=_Argument, kind=kind, help=text))

    def help(self) -> str:
        """The help, which begins with an example."""
        self.parser.description = self.about
        example = f"example: {self.example}\n\n" if self.example else ""
        return example + self.parser.format_help().rstrip()

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """What `words` stand for, by the names of the function's parameters; raises as `call`."""
        options = {one.shown: one for one in self.arguments if one.option_strings}
        try:
            found, more = self.parser.parse_known_args(_places_first(self._spelled(words, options)))
        except argparse.ArgumentError as error:
            option = error.argument_name or ""
            raise CordaError(
                f"{option} needs a value: {option} {options[option].metavar}"
            ) from None
        usage = f"usage: {self.parser.usage}; --help lists them"
        if more and more[0].startswith("-"):
            raise UnknownNameError(f"option of {self.prog}", more[0], options)
        if more:
            raise CordaError(f"{brief(more[0])} is one word too many for {self.prog}; {usage}")
        for one in self.arguments:
            if not (one.option_strings or one.is_optional or one.dest in found):
                raise CordaError(f"{self.prog} needs {one.shown}; {usage}")
        return self._sorted(vars(found))

    def _sorted(self, given: dict[str, Any]) -> dict[str, Any]:
        """The values of options go into the classes that they belong to."""
        made = {}
        for parameter, kind in self.kinds.items():
            own = {field.name for field in fields(kind)}  # type: ignore[arg-type]
            made[parameter] = kind(**{name: given.pop(name) for name in own if name in given})
        return {**given, **made}

    def _spelled(self, words: Sequence[str], options: Mapping[str, _Argument]) -> Iterator[str]:
        """The words with options as they are listed, and `=true` behind a switch without a value.

        argparse would take whatever follows a switch for its value, e.g. the file in `--fresh demo.yaml`.
        """
        for word, following in zip_longest(words, words[1:], fillvalue=""):
            option, equals, value = word.partition("=")
            option = option.replace("_", "-")
            if option in self.former:
                name = option[2:].replace("-", "_")
                name = current_name(self.former[option], name, self.prog)
                option = "--" + name.replace("_", "-")
            if not word.startswith("--"):
                yield word
            elif option not in options:
                raise UnknownNameError(f"option of {self.prog}", option, options)
            elif (
                equals
                or not options[option].is_switch
                or following.lower() in options[option].words
            ):
                yield f"{option}{equals}{value}"
            else:
                yield f"{option}=true"


def _places_first(words: Iterator[str]) -> list[str]:
    """The words with those that are given by their place before all options: between options argparse takes an argument that may
    be left out for left out."""
    places, options = [], []
    for word in words:
        if not word.startswith("--"):
            places.append(word)
            continue
        options.append(word)
        if "=" not in word and (value := next(words, None)) is not None:
            options.append(value)
    return places + options


def _distance(kind: type, name: str) -> int:
    """How many parents lie between a class and the one that declares an option of it."""
    return next(n for n, one in enumerate(kind.__mro__) if name in get_annotations(one))


class _Argument(argparse.Action):
    """An argument of a verb, which reads what is written for it as its type and its bounds want it."""

    def __init__(self, option_strings: Sequence[str], dest: str, kind: Any, **rest: Any) -> None:
        self.kind = kind
        self.kinds = _alternatives(kind)
        self.is_switch = bool in self.kinds
        self.is_optional = BY_PLACE in getattr(kind, "__metadata__", ())
        lists = [one for one in self.kinds if get_origin(one) in (list, Sequence, tuple)]
        # of a text with commas or a list the text is what is usually written
        self.items = _alternatives(get_args(lists[0])[0]) if lists else []
        self.adds_up = bool(lists) and str not in self.kinds
        self.words = list(_TRUTH) if self.is_switch else []
        for one in self.kinds:
            self.words += map(str, get_args(one)) if get_origin(one) is Literal else []
        self.shown = option_strings[0] if option_strings else dest.upper()
        rest["required"] = False  # what is missing is told in our words
        rest["nargs"] = "?" if self.is_switch or self.is_optional else None
        rest["metavar"] = "|".join(self.words) or dest.upper()
        super().__init__(option_strings, dest, **rest)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if self.adds_up:
            items = [_scalar(text, self.items) for text in _items(self.shown, values)]
            items = [*getattr(namespace, self.dest, []), *items]
            # a pair that is given item by item is whole only at its end
            setattr(namespace, self.dest, items if self._is_short(items) else self._fitted(items))
        elif self.dest in namespace:
            raise CordaError(f"{self.shown} is given twice; give it once")
        else:
            setattr(namespace, self.dest, self.read(values))

    def _is_short(self, items: list[Any]) -> bool:
        pairs = [get_args(one) for one in self.kinds if get_origin(one) is tuple]
        return any(Ellipsis not in pair and len(items) < len(pair) for pair in pairs)

    def _fitted(self, value: Any) -> Any:
        return fitted(value, self.kind, self.shown)

    def read(self, text: str) -> Any:
        """The value that `text` stands for."""
        value: Any = text
        if type(None) in self.kinds and str not in self.kinds and text == "null":
            value = None
        elif self.items and text.startswith("["):
            value = _items(self.shown, text)
        elif self.is_switch:
            value = _TRUTH.get(text.lower(), text)
        elif self._takes_mappings and text.lstrip().startswith("{"):
            value = parse_yaml(text, self.shown.lower().lstrip("-"))
        else:
            value = _scalar(text, self.kinds)
        return self._fitted(value)

    @property
    def _takes_mappings(self) -> bool:
        return any(get_origin(one) in (dict, Mapping) for one in self.kinds)


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


def _scalar(text: Any, kinds: Sequence[Any]) -> Any:
    """The number that `text` is, where `kinds` want one."""
    if str in kinds or not isinstance(text, str):
        return text
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _alternatives(kind: Any) -> list[Any]:
    """The members of a union, without their bounds."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [one for part in get_args(kind) for one in _alternatives(part)]
    return [kind]


def _parts(verb: Verb) -> tuple[str, str, dict[str, str]]:
    """What a docstring says: what the function does, an example, and each of its arguments."""
    about, told = described(inspect.getdoc(verb) or "", "Args")
    about, _, example = about.partition("\n\nExample:\n")
    return about, " ".join(example.split()), told
