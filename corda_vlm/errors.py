"""The errors of the package.

Every message names the thing that is wrong, says what was expected, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 1900
"""Characters of a message: it has to fit a screen, whatever somebody's file or a library put into it."""


MOST_CHOICES = 60
"""Names that a message lists."""


def brief(value: object) -> str:
    """A value as messages show it: on one line and short, whatever it is."""
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ):  # an integer of thousands of digits, or lists in lists in lists
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:80]} … {text[-15:]}"


def first_line(error: BaseException) -> str:
    """What an exception says, without the pages that some libraries add."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class CordaError(ValueError):
    """Base class: the input or the request is wrong, and the message says how to put it right.

    Attributes:
        is_relayed: is it that of another process of the run, which says it itself?
    """

    is_relayed = False

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if len(text) > LONGEST:  # what is wrong stands at its beginning, what to do at its end
            text = f"{text[: LONGEST - 500]} … {text[-450:]}"
        super().__init__(text)


class UnknownNameError(CordaError):
    """A name that is not among the choices; the message lists them and the nearest one."""

    def __init__(self, kind: str, name: object, choices: Iterable[str], hint: str = "") -> None:
        listed = sorted(map(str, choices))
        close = difflib.get_close_matches(str(name)[:100], listed, n=1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        more = len(listed) - MOST_CHOICES
        if more > 0:  # of thousands, those that may be meant
            near = difflib.get_close_matches(str(name)[:100], listed, n=MOST_CHOICES, cutoff=0.0)
            listed = [*sorted(near), f"and {more:,} more"]
        super().__init__(
            f"unknown {kind} {brief(name)}; choose one of: {', '.join(listed)}.{guess}"
            + (f" {hint}" if hint else "")
        )


class NoSitesError(CordaError):
    """A pattern, tower or role that matches no layer of the model."""


class CalibrationError(CordaError):
    """Calibration data that cannot give a covariance: empty, too few tokens, NaN or Inf, unreached sites."""


class ForeignFileError(CordaError):
    """A file that is corrupt, truncated, or was made from another model, other data or another mode."""


class NotFiniteError(CordaError):
    """A loss, weights or outputs that are NaN or Inf: the model diverged, or its numbers are too small for it."""


class DataError(CordaError):
    """Training, calibration or evaluation data that cannot be read as described."""
