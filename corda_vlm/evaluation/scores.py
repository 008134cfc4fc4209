"""Scores: a measured number with its interval, and the file that keeps them.

Intervals are 95 % percentile bootstrap intervals over examples everywhere: a closed form for
proportions (Wilson) would not hold for the mean over classes, nor for a difference of two models on
the same examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from corda_vlm.errors import DataError
from corda_vlm.jsonl import append_jsonl, is_number, read_jsonl, wrong_field

RESAMPLES = 2000
CONFIDENCE = 0.95
ROLES = {
    "gain": "the task that is being learnt",
    "retention": "knowledge from before that should stay",
    "selection": "a validation split on which the learning rate is chosen; in no table",
}


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its 95 % bootstrap interval, all in the value's own unit."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        task: the task's name in the suite.
        metric: "top1", "top5", "mean_per_class", "image_to_text_recall@1", …
        value, low, high: a share in [0, 1] (but for `NO_SHARE`) and its 95 % bootstrap interval over examples.
        n: examples measured.
        role: one of `ROLES`.
        chance: what guessing gives, the zero of "kept knowledge".
    """

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    role: str
    chance: float = 0.0


NO_SHARE = frozenset({"perplexity", "log_likelihood", "log_likelihood_per_token"})
"""Metrics that are no share of anything: reports write them as numbers, not in per cent."""


def value_text(metric: str, value: float) -> str:
    """A value of this metric for people."""
    if metric == "token_probability":  # 1 % and 0.1 % are 2.3 nats apart
        return f"{100 * value:#.3g}%"
    return f"{value:.4g}" if metric in NO_SHARE else f"{value:.1%}"


@dataclass(frozen=True)
class Outcome:
    """One metric before it is averaged: what happened on each example.

    Attributes:
        metric: its name.
        values: (n,) a number for each example, 1 for right and 0 for wrong.
        groups: (n,) the class of each example where classes count equally, or None where examples do.
        chance: what guessing gives.
        weights: (n,) how much each example counts, e.g. its tokens, or None where all count equally.
        exp: the score is exp of the average, as of log-likelihoods.
    """

    metric: str
    values: Float[np.ndarray, " n"]
    groups: Int[np.ndarray, " n"] | None = None
    chance: float = 0.0
    weights: Float[np.ndarray, " n"] | None = None
    exp: bool = False

    def score(self, task: str, role: str, *, resamples: int = RESAMPLES, seed: int = 0) -> Score:
        """The average over examples (or over classes) with its interval."""
        interval = bootstrap(
            self.values, self.groups, weights=self.weights, resamples=resamples, seed=seed
        )
        value, low, high = interval.value, interval.low, interval.high
        if self.exp:  # rises with the average, so its bounds are those of the average
            value, low, high = math.exp(value), math.exp(low), math.exp(high)
        return Score(task, self.metric, value, low, high, len(self.values), role, self.chance)


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


def paired_gain(
    outcome: Outcome, base: Outcome, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """How far a model's score lies above the base model's, with its paired bootstrap interval over the same examples.

    Of scores that are exp of an average the averages are paired, and the bounds are those at the base model's own average.
    None where the two were not measured on the same examples.
    """
    same = _equal(outcome.groups, base.groups) and _equal(outcome.weights, base.weights)
    if not same or outcome.values.shape != base.values.shape or outcome.exp != base.exp:
        return None
    found = bootstrap(
        outcome.values - base.values,
        outcome.groups,
        weights=outcome.weights,
        resamples=resamples,
        seed=seed,
    )
    if not outcome.exp:
        return found
    level = float(np.average(base.values, weights=base.weights))
    value, low, high = (
        math.exp(level + difference) - math.exp(level)
        for difference in (found.value, found.low, found.high)
    )
    return Interval(value, low, high)


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)


def gain_of(row: Mapping[str, Any]) -> Interval | None:
    """The `paired_gain` that a row of scores tells, None where it has none."""
    return _interval_in(row, "gain", "gain_low", "gain_high")


def interval_of(row: Mapping[str, Any]) -> Interval | None:
    """The score of a row with its interval, None where it has none."""
    return _interval_in(row, "value", "low", "high")


def _interval_in(row: Mapping[str, Any], *names: str) -> Interval | None:
    value, low, high = (row.get(name) for name in names)
    if value is None or low is None or high is None:
        return None
    return Interval(float(value), float(low), float(high))


def score_row(
    score: Score,
    *,
    run: str,
    method: str,
    learning_rate: float | None = None,
    seed: int | None = None,
    scale: float = 1.0,
    steps: int | None = None,
    seconds: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One row of scores.jsonl. `method` is "base" for the model before training."""
    return {
        "run": run, "method": method, "learning_rate": learning_rate, "seed": seed,
        "scale": scale, "steps": steps, "seconds": seconds, **asdict(score), **more,
    }  # fmt: skip


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a scores file in one write, see `append_jsonl`.

    Raises:
        CordaError: a value is NaN, Inf or no JSON; or the disk is full.
    """
    append_jsonl(path, rows, "score")


def read_rows(path: str | Path, *, missing_ok: bool = False) -> list[dict[str, Any]]:
    """The rows of a scores file. A last line without an end, torn by a kill, is reported and dropped.

    Raises:
        ForeignFileError: no such file (unless `missing_ok`), or a line that is not a score.
    """
    hint = "evaluate a model into it first"
    return read_jsonl(path, "score", check=_not_a_score, missing_ok=missing_ok, hint=hint)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: Any) -> bool:
    return is_number(value) and value == int(value)


_NEEDED = {"method": _is_name, "task": _is_name, "metric": _is_name, "value": is_number}
_OPTIONAL = {
    "learning_rate": is_number, "seed": _is_count, "scale": is_number, "low": is_number, "high": is_number,
    "n": _is_count, "steps": _is_count, "chance": is_number, "forecast": is_number, "gain": is_number,
    "gain_low": is_number, "gain_high": is_number,
    "role": lambda role: isinstance(role, str) and role in ROLES,
}  # fmt: skip


def _not_a_score(row: Mapping[str, Any]) -> str | None:
    return wrong_field(row, _NEEDED, _OPTIONAL)


def done(
    rows: Sequence[Mapping[str, Any]],
    *,
    method: str,
    learning_rate: float | None = None,
    seed: int | None = None,
    scale: float = 1.0,
) -> set[tuple[str, str]]:
    """The (task, metric) pairs already measured for one trained model, so that a run resumes."""
    wanted = (method, learning_rate, seed, scale)
    return {
        (row["task"], row["metric"])
        for row in rows
        if (
            row["method"],
            row.get("learning_rate"),
            row.get("seed"),
            1.0 if row.get("scale") is None else row["scale"],
        )
        == wanted
    }
