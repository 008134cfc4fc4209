"""Two measures of one task, and what lies between them: the gain, and the share of what was known that is kept.

Intervals are 95 % bootstrap intervals over samples, paired where both results tell their samples: both models see each resampled
sample, so that what makes a sample hard for both cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from corda_vlm.errors import CordaError, DataError
from corda_vlm.evaluation.bootstrap import (
    RESAMPLES,
    Interval,
    interval_of_draws,
    resampled_means,
)
from corda_vlm.files import shown
from corda_vlm.names import quoted
from corda_vlm.report.analysis.kept import kept_share
from corda_vlm.report.formats.base import Measure, Samples

PAIRED, OWN, UNPAIRED, NONE = "paired", "by the run", "unpaired", "none"
SEEDS = "over seeds"
"""How the interval of a change was found: over the same samples; by the run that measured both, which told the gain alone; from
the two intervals; or not at all. Over seeds: from the gains or the scores of several trainings."""


@dataclass(frozen=True)
class Change:
    """One task before and after.

    Attributes:
        before, after: what was measured.
        role: "gain" or "retention".
        chance: the zero of what is known.
        guessed: the chance is not known, and 0 was taken.
        how: one of the ways to an interval.
        gain: after minus before, in the metric's unit; its interval where there is one.
        kept: (after − chance) / (before − chance); None where more is not better, or nothing was known.
        draws: resamples of `kept`, for the interval of a mean over tasks; None without an interval.
        unknown: before training the model did no better than chance.
    """

    before: Measure
    after: Measure
    role: str
    chance: float
    guessed: bool
    how: str
    gain: Interval | float
    kept: Interval | float | None
    draws: Float[np.ndarray, " draws"] | None
    unknown: bool

    @property
    def task(self) -> str:
        return self.before.task


def change(
    before: Measure,
    after: Measure,
    role: str,
    chance: float | None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Change:
    """What lies between two measures of one task and metric.

    Args:
        chance: None where it is not known: 0 is taken.

    Raises:
        CordaError: they were not measured alike: other shots, another version.
        DataError: both tell their samples, and these are not the same.
    """
    _check_alike(before, after)
    level = 0.0 if chance is None else chance
    how, draws = _resampled(before, after, resamples, seed)
    value = after.value - before.value
    gain: Interval | float = value
    low = before.interval.low if before.interval is not None else before.value
    if draws is not None:
        gain = interval_of_draws(value, draws[:, 1] - draws[:, 0])
        if before.interval is None:
            low = float(np.percentile(draws[:, 0], 2.5))
    unknown = before.rises and low <= level
    share = kept_share(before.metric, after.value, before.value, low, level)
    kept, shares = _kept(share if before.rises else None, level, draws)
    return Change(before, after, role, level, chance is None, how, gain, kept, shares, unknown)


def _kept(
    share: float | None, chance: float, draws: np.ndarray | None
) -> tuple[Interval | float | None, np.ndarray | None]:
    """The share with its interval, and its resamples."""
    if share is None or draws is None:
        return share, None
    known = draws[:, 0] - chance
    shares = np.where(known > 0, (draws[:, 1] - chance) / np.where(known > 0, known, 1.0), np.nan)
    usable = shares[~np.isnan(shares)]
    return (interval_of_draws(share, usable), shares) if len(usable) else (share, None)


def _resampled(
    before: Measure, after: Measure, resamples: int, seed: int
) -> tuple[str, np.ndarray | None]:
    """How, and (draws, 2): the scores before and after in each resample."""
    if before.samples is not None and after.samples is not None:
        return PAIRED, _paired(before, before.samples, after, after.samples, resamples, seed)
    generator = np.random.default_rng(seed)
    gain = after.gain
    if gain is not None and np.isclose(before.value + gain.value, after.value, atol=1e-9):
        drawn = gain.value + _width(gain) * generator.standard_normal(resamples)
        how = OWN if after.seeds is None else SEEDS
        return how, np.stack([np.full(resamples, before.value), before.value + drawn], axis=1)
    if (first := before.interval) is not None and (second := after.interval) is not None:
        noise = generator.standard_normal((resamples, 2))
        middle = np.array([first.value, second.value])
        return (UNPAIRED if after.seeds is None else SEEDS), middle + noise * np.array(
            [_width(first), _width(second)]
        )
    return NONE, None


def _width(interval: Interval) -> float:
    """The standard error that a 95 % interval stands for."""
    return (interval.high - interval.low) / (2 * 1.96)


def _paired(
    before: Measure,
    known: Samples,
    after: Measure,
    new: Samples,
    resamples: int,
    seed: int,
) -> np.ndarray:
    order = _order(before, known, after, new)
    first, second = known.outcome, new.outcome
    means = resampled_means(
        first.values,
        second.values[order],
        groups=first.groups,
        weights=first.weights,
        resamples=resamples,
        seed=seed,
    )
    return np.exp(means[1:]) if first.exp else means[1:]


def _order(before: Measure, known: Samples, after: Measure, new: Samples) -> np.ndarray:
    """Where each sample of the one stands in the other.

    Raises:
        DataError: they are not the same samples.
    """
    place = {one: at for at, one in enumerate(new.ids)}
    both = [one for one in known.ids if one in place]
    files = f"{shown(before.file)} and {shown(after.file)}"
    if len(both) < max(len(known.ids), len(new.ids)):
        alone = sorted(set(known.ids).symmetric_difference(new.ids))
        raise DataError(
            f"the samples of {before.task!r} do not pair: {len(known.ids):,} before and {len(new.ids):,} after, {len(both):,} of "
            f"them the same (not {quoted(alone, 3)}); evaluate both on the same data with the same limit. In {files}"
        )
    order = np.array([place[one] for one in known.ids], dtype=np.int64)
    if known.documents is not None and new.documents is not None:
        for number, one in enumerate(known.ids):
            if known.documents[number] != new.documents[order[number]]:
                raise DataError(
                    f"the samples of {before.task!r} do not pair: {one!r} is of other data after than before; evaluate both on "
                    f"the same data. In {files}"
                )
    return order


def _check_alike(before: Measure, after: Measure) -> None:
    for name, value in before.conditions.items():
        other = after.conditions.get(name, value)
        if other != value:
            raise CordaError(
                f"{before.task!r} was not measured alike: the {name} is {value} before and {other} after; evaluate again with the "
                f"same. In {shown(before.file)} and {shown(after.file)}"
            )
