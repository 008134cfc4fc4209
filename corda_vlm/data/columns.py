"""Columns that a user names, or sentences over the columns, and what counts as nothing in a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from corda_vlm.data.spec import DataSpec
from corda_vlm.errors import DataError, UnknownNameError


def asked_column(
    asked: str, usual: Sequence[str], names: Sequence[str], spec: DataSpec, what: str
) -> str | None:
    """A column, or a sentence, which may be a format string over the columns; None where "auto" finds none.

    Raises:
        UnknownNameError: it is one word, and no column has this name.
    """
    if asked == "auto":
        return next((name for name in usual if name in names), None)
    if "{" not in asked and " " not in asked.strip() and asked not in names:
        raise UnknownNameError(f"{what} column of {spec}", asked, names)
    return asked


def filled(asked: str, values: Mapping[str, Any]) -> Any:
    """What a column or a sentence is for one row.

    Raises:
        DataError: the sentence cannot be filled in; the message lists the columns.
    """
    if "{" not in asked:
        return values.get(asked, asked)
    return formatted(asked, {k: "" if is_nothing(v) else v for k, v in values.items()}, "")


def formatted(sentence: str, values: Mapping[str, Any], what: str) -> str:
    """A format string filled in. Raises `DataError`, which begins with `what`, if that cannot be done."""
    try:
        return sentence.format(**values)
    except (LookupError, ValueError, AttributeError, TypeError, MemoryError) as error:
        raise DataError(
            f"{what}{sentence!r}: cannot be filled in ({type(error).__name__}: {error}); "
            f"the columns are {', '.join(sorted(values))}"
        ) from error


def is_nan(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and bool(np.isnan(value))


def is_nothing(value: Any) -> bool:
    """Tables that went through pandas say "nan" where a cell is empty."""
    return value is None or is_nan(value) or (isinstance(value, str) and value in ("", "nan"))


def is_empty(value: Any) -> bool:
    """None, NaN, a text without a word, or a list without an item. The word "nan" is a text."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or is_nan(value) or (isinstance(value, (list, tuple)) and not value)


CUT_TEXT = "holds half of a surrogate pair, e.g. of an emoji that was cut, which is no text"


def is_whole(text: str) -> bool:
    """Can this text be written as UTF-8? Half of a surrogate pair, e.g. of an emoji that was cut, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
