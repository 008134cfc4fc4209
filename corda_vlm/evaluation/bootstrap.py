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
    values, heavy = _checked(values, weights)
    members = np.zeros(values.size, dtype=np.int64) if groups is None else np.asarray(groups)
    _, members = np.unique(members, return_inverse=True)
    n_groups = int(members.max()) + 1

    # Drawing n examples with replacement is one multinomial draw over the distinct (group, value, weight)
    # cells: the same distribution as drawing indices, at a cost that does not grow with n.
    cells, counts = np.unique(np.stack([members, values, heavy]), axis=1, return_counts=True)
    cell_group, cell_value, cell_weight = cells[0].astype(np.int64), cells[1], cells[2]
    one_hot = np.zeros((len(counts), n_groups))
    one_hot[np.arange(len(counts)), cell_group] = 1.0

    def mean_of(drawn: np.ndarray) -> np.ndarray:  # (rows, cells) -> (rows,)
        size = (drawn * cell_weight) @ one_hot  # (rows, groups)
        total = (drawn * cell_weight * cell_value) @ one_hot
        seen = size > 0
        return np.where(seen, total / np.where(seen, size, 1), 0.0).sum(-1) / seen.sum(-1)

    generator = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(counts))  # rows drawn at a time, to bound memory
    drawn = [
        mean_of(
            generator.multinomial(
                values.size, counts / values.size, size=min(chunk, resamples - at)
            )
        )
        for at in range(0, resamples, chunk)
    ]
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(np.concatenate(drawn), [tail, 100.0 - tail])
    value = float(mean_of(counts[None].astype(np.float64))[0])
    return Interval(value, float(low), float(high))


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
