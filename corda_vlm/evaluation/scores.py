"""Scores: what happened on each example, the number that it makes, and how numbers are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from corda_vlm.evaluation.bootstrap import RESAMPLES, Interval, bootstrap

BASE = "base"
"""What rows of scores call the model before training, in place of a method."""

TASK_ROLES = {
    "gain": "the task that is being learned",
    "retention": "knowledge from before that should stay",
    "selection": "a validation split on which the learning rate is chosen; in no table",
}


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        task: the task's name in the suite.
        metric: "top1", "top5", "mean_per_class", "image_to_text_recall@1", …
        value, low, high: a share in [0, 1] (but for `NO_SHARE`) and its 95 % bootstrap interval over examples.
        n: examples measured.
        role: one of `TASK_ROLES`.
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
    interval = bootstrap(
        outcome.values - base.values,
        outcome.groups,
        weights=outcome.weights,
        resamples=resamples,
        seed=seed,
    )
    if not outcome.exp:
        return interval
    level = float(np.average(base.values, weights=base.weights))
    value, low, high = (
        math.exp(level + difference) - math.exp(level)
        for difference in (interval.value, interval.low, interval.high)
    )
    return Interval(value, low, high)


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
