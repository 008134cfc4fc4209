"""Intervals: 95 % percentile bootstrap intervals over examples, everywhere.

A closed form for proportions (Wilson) would not hold for the mean over classes, nor for a difference of two models on the
same examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from corda_vlm.errors import DataError
from corda_vlm.evaluation.options import RESAMPLES

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its 95 % bootstrap interval, all in the value's own unit."""

    value: float
    low: float
    high: float


def bootstrap(
    values: Shaped[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"] | None = None,
    *,
    weights: Float[np.ndarray, " n"] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The mean of `values` and its percentile bootstrap interval over examples.

    With `groups`, the mean over groups of the mean within each, so that rare classes count as much
    as common ones; a class that a resample does not contain is left out of that resample's mean. With `weights`
    (above 0) means are weighted, and a resample's are over the weights it drew.

    Raises:
        DataError: no examples, or one whose value is not a finite number.
    """
    means = resampled_means(values, groups=groups, weights=weights, resamples=resamples, seed=seed)
    return interval_of_draws(float(means[0, 0]), means[1:, 0], confidence)


def interval_of_draws(
    value: float, draws: Float[np.ndarray, " draws"], confidence: float = CONFIDENCE
) -> Interval:
    """A value with the percentile interval of what its resamples gave."""
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(draws, [tail, 100.0 - tail])
    return Interval(value, float(low), float(high))


def resampled_means(
    *columns: Shaped[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"] | None = None,
    weights: Float[np.ndarray, " n"] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float[np.ndarray, "rows columns"]:
    """The means of columns of values of the same examples: first of all examples, then of each resample of them.

    Each row is of one resample, the same for all columns, so what two columns share cancels in their difference or ratio.
    `groups` and `weights` are as of `bootstrap`.

    Raises:
        DataError: no examples, or one whose value is not a finite number.
    """
    checked = [_checked(values, weights) for values in columns]
    heavy = checked[0][1]
    members = np.zeros(heavy.size, dtype=np.int64) if groups is None else np.asarray(groups)
    _, members = np.unique(members, return_inverse=True)
    n_groups = int(members.max()) + 1

    # Drawing n examples with replacement is one multinomial draw over the distinct (group, values, weight)
    # cells: the same distribution as drawing indices, at a cost that does not grow with n.
    rows = np.stack([members, *(values for values, _ in checked), heavy])
    cells, counts = np.unique(rows, axis=1, return_counts=True)
    cell_group, cell_values, cell_weight = cells[0].astype(np.int64), cells[1:-1], cells[-1]
    one_hot = np.zeros((len(counts), n_groups))
    one_hot[np.arange(len(counts)), cell_group] = 1.0

    def means_of(drawn: np.ndarray) -> np.ndarray:  # (rows, cells) -> (rows, columns)
        size = (drawn * cell_weight) @ one_hot  # (rows, groups)
        seen = size > 0
        means = []
        for cell_value in cell_values:
            total = (drawn * cell_weight * cell_value) @ one_hot
            means.append(
                np.where(seen, total / np.where(seen, size, 1), 0.0).sum(-1) / seen.sum(-1)
            )
        return np.stack(means, axis=-1)

    generator = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(counts))  # rows drawn at a time, to bound memory
    drawn = [
        means_of(
            generator.multinomial(heavy.size, counts / heavy.size, size=min(chunk, resamples - at))
        )
        for at in range(0, resamples, chunk)
    ]
    return np.concatenate([means_of(counts[None].astype(np.float64)), *drawn])


def _checked(values: Any, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and their weights, 1 where none are given; raises as `bootstrap`."""
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise DataError(
            "there is not one example to measure; check the data's split, filter and limit"
        )
    if not np.isfinite(values).all():
        raise DataError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite"
        )
    heavy = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(heavy) & (heavy > 0)).all():
        raise DataError("the weights of a mean must be finite and above 0")
    return values, heavy


def paired_difference(
    first: Shaped[np.ndarray, " n"],
    second: Shaped[np.ndarray, " m"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """mean(first − second) over the same examples, with its paired bootstrap interval.

    Both models see each resampled example, so what makes an example hard for both cancels. The
    difference is real at this confidence when the interval does not contain 0.

    Raises:
        DataError: the two do not have one value for each of the same examples.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise DataError(
            f"a paired difference needs the same examples twice, got {first.size} and {second.size}"
        )
    return bootstrap(first - second, resamples=resamples, seed=seed, confidence=confidence)
