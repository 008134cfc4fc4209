"""The weight of a term, steered while a model trains so that a probe stays above a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import TrainerCallback

from corda_vlm.train.budget.options import KEEP, WEIGHT

RATE = 1.0
"""Of the ascent on the logarithm of the weight."""

RANGE = 1000.0
"""The weight stays within so many times, and one so many-th, of where it started."""

SOFT = 0.02
"""Of a budget that lets nothing be forgotten, the share that counts as one unit of the slack all the same."""


def next_weight(weight: float, start: float, kept: float, keep: float) -> float:
    """One step of dual ascent on `log weight`, along what the probe lacks of the budget in units of what may be forgotten.

    The weight is the multiplier of the constraint `kept ≥ keep`, and stays positive, so the ascent is multiplicative. A step
    changes it by at most a factor of e.

    Args:
        start: the weight at the beginning.
        kept: what the probe says now.
    """
    lacking = (keep - kept) / max(1 - keep, SOFT)
    step = RATE * min(max(lacking, -1.0), 1.0)
    return min(max(weight * math.exp(step), start / RANGE), start * RANGE)


class Steered(Protocol):
    """A trainer with `PenaltyMixin`."""

    def weight_of(self, name: str) -> float: ...
    def set_weight(self, name: str, weight: float) -> None: ...
    def log(self, logs: dict[str, float]) -> None: ...


class Steering(TrainerCallback):
    """Looks at one part of the probe every so many steps, and sets the weight.

    Each look is logged, as "keep" and "keep_weight", and what is logged is in a checkpoint: a training that is gone on with
    takes its weight from there. So the weight is a function of the seed and of the step.
    """

    def __init__(
        self,
        trainer: Any,
        term: str,
        keep: float,
        every: int,
        look: Callable[[int], float],
    ) -> None:
        self.trainer, self.term, self.keep, self.every, self.look = trainer, term, keep, every, look
        self._start = float(trainer.weight_of(term))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.set_weight(self.term, last_weight(state.log_history, self._start))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = int(state.global_step)
        if step % self.every or step >= state.max_steps:
            return
        kept = self.look(step // self.every - 1)
        weight = next_weight(self.trainer.weight_of(self.term), self._start, kept, self.keep)
        self.trainer.set_weight(self.term, weight)
        due = control.should_log
        self.trainer.log({KEEP: kept, WEIGHT: weight})
        control.should_log = due  # which a log ends


def last_weight(history: Sequence[dict[str, Any]], start: float) -> float:
    """The weight that was last logged."""
    return next((float(entry[WEIGHT]) for entry in reversed(history) if WEIGHT in entry), start)
