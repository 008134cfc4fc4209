"""What a probe says of a training: the share of what the model knew that is still there, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from corda_vlm.errors import CordaError
from corda_vlm.evaluation.bootstrap import bootstrap

MARGIN = 0.02
"""By so much more than half of what may be forgotten the interval of a probe may reach to either side."""

_Z = 1.96
_SWAPPED = 0.02
"""The share of records that a training changes to and fro whatever it keeps."""


@dataclass(frozen=True)
class Kept:
    """The share of what was known that is kept: (score − chance) / (score before − chance).

    Attributes:
        share: 1 is the model before training, 0 is guessing.
        low, high: its 95 % bootstrap interval, over the same records before and after.
        records: looked at.
    """

    share: float
    low: float
    high: float
    records: int

    def __str__(self) -> str:
        return f"{self.share:.1%} ({self.low:.1%} to {self.high:.1%}, {self.records} records)"


def share_kept(
    now: Float[np.ndarray, " n"], before: Float[np.ndarray, " n"], known: float
) -> float:
    """The share that is kept, of what happened on each record.

    Args:
        known: the score of the whole probe before training, chance subtracted. That of a part would be too uncertain to divide
            by, and may be zero.
    """
    return float(1 + (now - before).mean() / known)


def kept_of(now: Float[np.ndarray, " n"], before: Float[np.ndarray, " n"], chance: float) -> Kept:
    """The same with its interval. It is a ratio of two means: the interval is that of its linear part, the mean of
    `(now − chance − share (before − chance)) / (mean before − chance)`, so that what makes a record hard cancels."""
    known = float(before.mean()) - chance
    share = share_kept(now, before, known)
    rest = (now - chance - share * (before - chance)) / known
    interval = bootstrap(rest)
    return Kept(share, share + interval.low, share + interval.high, len(now))


def half_width(known: float, keep: float, count: int) -> float:
    """Half the 95 % interval that `count` records will give at the budget.

    Net of chance a share `known (1 − keep)` of them is lost; the variance of the difference is that of as many losses, as many
    again that gains make up for, and a few that change anyway.

    Args:
        known: the score before training, chance subtracted.
    """
    return _Z * math.sqrt(_changed(known, keep) / count) / known if count else math.inf


def widest(keep: float) -> float:
    """How far the interval of a probe may reach to either side: half of what may be forgotten, and `MARGIN` more."""
    return (1 - keep) / 2 + MARGIN


def records_needed(known: float, keep: float) -> int:
    """How many records make half the interval as small as `widest`."""
    return math.ceil(_changed(known, keep) * (_Z / (known * widest(keep))) ** 2)


def _changed(known: float, keep: float) -> float:
    return min(1.0, 2 * known * (1 - keep) + _SWAPPED)


def check_count(count: int, keep: float, whose: str) -> None:
    """Raise `CordaError` for fewer records than would tell whether a budget is kept, even of a model that knows all of them.

    Args:
        whose: begins the message, before their number.
    """
    if half_width(1.0, keep, count) > widest(keep):
        raise CordaError(
            f"{whose} {count} records are too few to tell whether {keep:.0%} is kept: even of a model that knows all of them it "
            f"takes {records_needed(1.0, keep)}; give a larger probe (probe_records), more records of the knowledge, or a lower keep"
        )


def check_probe(
    before: Float[np.ndarray, " n"], chance: float, keep: float, metric: str, what: object
) -> None:
    """Raise `CordaError` for a probe that cannot tell whether a budget is kept.

    Args:
        before: what the model did on each record before training.
        what: names the probe's records.
    """
    if not len(before):
        check_count(0, keep, f"{what}:")
    count, score = len(before), float(before.mean())
    known = score - chance
    if known <= 0 or (chance > 0 and bootstrap(before).low <= chance):
        raise CordaError(
            f"{what}: before training the model's {metric} on these {count} records is {score:.1%}, where chance is {chance:.1%}: it "
            "knows nothing there that could be kept. Give another probe, or prompts and class names that suit the model "
            "(probe_templates)"
        )
    width = half_width(known, keep, count)
    if width > widest(keep):
        raise CordaError(
            f"{what}: {count} records are too few to tell whether {keep:.0%} is kept: the 95 % interval would reach "
            f"{100 * width:.1f} points to either side, and may reach {100 * widest(keep):.3g}. It takes "
            f"{records_needed(known, keep)} records: give a larger probe (probe_records, or more data), or a lower keep"
        )
