"""What all classes of options share: each value is of its declared type and within its bounds.

    @dataclass(frozen=True)
    class CalibrationOptions:
        samples: Count = 256
        rates: Annotated[list[Positive], Items(least=1, distinct=True)] = ...

        def __post_init__(self) -> None:
            check_options(self)

The bounds stand in the type, so that Python, the command line and YAML are told the same. A class may have a `FORMER`, a
mapping from the former name of an option to its name: the command line and YAML still take it, with a line that says so.
"""

from __future__ import annotations

import logging
import math
import textwrap
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from inspect import cleandoc
from numbers import Number
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from corda_vlm.errors import CordaError, UnknownNameError, brief

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Range:
    """The bounds of a number; NaN and infinities are never within them."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        bounds = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        return " and ".join(f"{word} {n:,}" for word, n in bounds.items() if n is not None)

    def holds(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


@dataclass(frozen=True)
class Items:
    """How many items a list (or characters a text) has, and whether each may stand in it but once."""

    least: int = 0
    distinct: bool = False


Text = Annotated[str, Items(least=1)]
"""Not empty."""
BY_PLACE = "by place"
"""In a verb's `Annotated[str | None, BY_PLACE]`: given by its place among the words, as what has no default is, and may be left out."""
Count = Annotated[int, Range(at_least=1)]
CountOrZero = Annotated[int, Range(at_least=0)]
Seed = Annotated[int, Range(at_least=0, below=2**32)]
"""What every generator of random numbers takes."""
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, below=1)]


def check_options(options: Any, kind: type | None = None) -> None:
    """Raise a `CordaError` for the first value of a dataclass that is not of its declared type or out of its bounds.

    Args:
        kind: look only at what this class declares, a parent of the dataclass.
    """
    hints = hints_of(kind or type(options))
    for field in fields(kind or options):
        fitted(getattr(options, field.name), hints[field.name], field.name)


def options_from(kind: type[T], keywords: Mapping[str, Any], function: str) -> T:
    """A dataclass of options from the keywords of a function.

    Args:
        function: its name, for the message.

    Raises:
        UnknownNameError: a keyword that is no option; lists those that are.
        CordaError: what the class raises.
    """
    known = option_names(kind)
    for name in keywords:
        if name not in known:
            raise UnknownNameError(f"option of {function}", name, known)
    return kind(**{name: _plain(value) for name, value in keywords.items()})


def _plain(value: Any) -> Any:
    """A number of NumPy, or a tensor of one number, as Python has it."""
    item = getattr(value, "item", None)
    return item() if isinstance(value, Number) and callable(item) else value


def option_names(kind: Any) -> list[str]:
    """The names of the options that a class has."""
    return [field.name for field in fields(kind) if field.init]


def as_keywords(options: Any, kind: type) -> dict[str, Any]:
    """Those options that `kind` has, a parent of their class or one with fields of the same names."""
    return {name: getattr(options, name) for name in option_names(kind)}


def narrowed(options: Any, kind: type[T]) -> T:
    """As a `kind`, a parent of the class of `options`."""
    return kind(**as_keywords(options, kind))


def renamed(kind: Any, content: Mapping[str, T]) -> dict[str, T]:
    """What is given by the names that options had, by those that they have; for what was written before."""
    former = getattr(kind, "FORMER", {})
    return {former.get(name, name): value for name, value in content.items()}


@cache
def current_name(kind: Any, name: str, where: str) -> str:
    """The name that an option has today, with a line in the log for who wrote a former one."""
    former = getattr(kind, "FORMER", {})
    if name not in former:
        return name
    _log.warning("%s: %s is now called %s; the former name will go", where, name, former[name])
    return former[name]


@cache
def help_of(kind: type) -> dict[str, str]:
    """The help of each option: what the `Attributes:` of its class, or of the parent that declares it, say."""
    texts: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        if is_dataclass(parent):
            texts |= described(parent.__doc__ or "", "Attributes")[1]
    return texts


def described(doc: str, section: str) -> tuple[str, dict[str, str]]:
    """What a docstring says before its section `Args:` or `Attributes:`, and there of each name."""
    about, _, listed = cleandoc(doc).partition(f"\n\n{section}:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(listed).splitlines():
        if line.startswith(" "):
            texts[name] += " " + line.strip()
        elif ":" in line:
            name, _, text = line.partition(":")
            texts[name] = text.strip()
        else:  # the next section, or none
            break
    return about, texts


def read_options(kind: type[T], content: Mapping[Any, Any], where: str, path: str = "") -> T:
    """A dataclass of options from a mapping, e.g. of a YAML file; nested ones likewise.

    Args:
        where: names the mapping in messages, e.g. the file.
        path: the keys that led to it, each with a dot behind it.

    Raises:
        UnknownNameError: a key that is no option; lists those that are.
        CordaError: an option that is missing, of the wrong type or out of its bounds, or what the class raises.
    """
    hints = hints_of(kind)
    known = {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]
    given: dict[Any, Any] = {}
    for key, value in content.items():
        name = current_name(kind, key, where) if isinstance(key, str) else key
        if name not in known:
            raise UnknownNameError(f"option in {where}", f"{path}{key}", [path + n for n in known])
        if name in given:
            raise CordaError(f"{where}: {path}{name} is given twice, once by a former name")
        given[name] = value
    content = given
    values = {}
    for name, field in known.items():
        if name in content:
            values[name] = fitted(content[name], hints[name], f"{path}{name}", where)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise CordaError(f"{where}: no {path}{name}; it has to be given")
    return kind(**values)


def fitted(value: Any, kind: Any, name: str, where: str = "") -> Any:
    """`value` as a `kind`, e.g. 1 as the float 1.0 and a mapping as the dataclass it stands for.

    Args:
        kind: a type, or what `typing` makes of types; `Annotated` with `Range` or `Items` for bounds.
        name: of the option.
        where: what it stands in.

    Raises:
        CordaError: it is none, or out of the bounds.
    """
    try:
        return _fitted(value, kind, name, where)
    except _WrongTypeError:
        prefix = f"{where}: " if where else ""
        raise CordaError(
            f"{prefix}{name} cannot be {brief(value)}; it must be {_described(kind)}"
            + (" (text goes in quotes)" if _takes_text(kind) and not isinstance(value, str) else "")
        ) from None


class _WrongTypeError(Exception):
    pass


def _fitted(value: Any, kind: Any, name: str, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        found = _fitted(value, args[0], name, where)
        for bound in args[1:]:
            _check_bound(found, bound, f"{where}: {name}" if where else name)
        return found
    if origin in (Union, types.UnionType):
        return _one_of(value, args, name, where)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        if isinstance(value, str) and all(isinstance(choice, str) for choice in args):
            raise UnknownNameError(name, value, args)
        raise _WrongTypeError
    if origin in (list, Sequence, tuple):
        return _sequence(value, origin, args, name, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _WrongTypeError
        if args[0] is str and not all(isinstance(key, str) for key in value):
            raise _WrongTypeError
        return {key: fitted(one, args[1], f"{name}.{key}", where) for key, one in value.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            raise _WrongTypeError
        return read_options(kind, value, where or "the options", f"{name}.")
    if kind is float:
        return _number(value)
    if kind is Path:
        kind = (str, Path)
    if kind in (None, type(None)):
        kind = type(None)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _WrongTypeError
    return value


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _WrongTypeError
    try:
        number = float(value)
    except OverflowError:
        raise _WrongTypeError from None
    if not math.isfinite(number):
        raise _WrongTypeError
    return number


def _one_of(value: Any, kinds: Sequence[Any], name: str, where: str) -> Any:
    """As the first of `kinds` that it is; whatever else is wrong with one of that kind is raised."""
    told: CordaError | None = None
    others = [kind for kind in kinds if kind is not type(None)]
    for kind in kinds:
        try:
            return _fitted(value, kind, name, where)
        except _WrongTypeError:
            continue
        except UnknownNameError as error:
            if len(others) == 1:  # else its choices are not all there are
                told = told or error
        except CordaError as error:
            told = told or error
    if told is not None:
        raise told
    raise _WrongTypeError


def _sequence(value: Any, origin: Any, args: tuple[Any, ...], name: str, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _WrongTypeError
    if origin is not tuple or args[1:] == (Ellipsis,):
        kinds = [args[0]] * len(value)
    elif len(args) != len(value):
        raise _WrongTypeError
    else:
        kinds = list(args)
    items = [
        fitted(one, kind, f"{name}[{place}]", where)
        for place, (one, kind) in enumerate(zip(value, kinds, strict=True))
    ]
    return tuple(items) if origin is tuple else items


def _check_bound(value: Any, bound: Any, name: str) -> None:
    if isinstance(bound, Range) and not bound.holds(value):
        raise CordaError(f"{name} is {brief(value)}; it must be {bound}")
    if isinstance(bound, Items):
        if len(value) < bound.least:
            raise CordaError(f"{name} is {brief(value)}; it needs at least {bound.least}")
        if bound.distinct:
            twice = [one for place, one in enumerate(value) if one in value[:place]]
            if twice:
                raise CordaError(f"{name} holds {brief(twice[0])} twice; each counts once")


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The declared type of each option of a class, its bounds included."""
    return get_type_hints(kind, include_extras=True)


_WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


def _described(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        ranges = [str(bound) for bound in args[1:] if isinstance(bound, Range)]
        return " ".join([_described(args[0]), *ranges])
    if origin in (Union, types.UnionType):
        return " or ".join(_described(one) for one in args)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (list, Sequence):
        return f"a list, each {_described(args[0])}"
    if origin is tuple:
        return "a list of " + " and ".join(_described(one) for one in args if one is not Ellipsis)
    if origin in (dict, Mapping) or is_dataclass(kind):
        return "a mapping"
    if kind in (None, type(None)):
        return "null"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _takes_text(kind: Any) -> bool:
    if get_origin(kind) in (dict, Mapping):
        return False
    return kind is str or any(_takes_text(one) for one in get_args(kind) if isinstance(one, type))
