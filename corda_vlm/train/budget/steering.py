"""Looks at a probe while a model trains: the weight of a term is steered so that it stays above a budget, or the training ends."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import TrainerCallback

from corda_vlm.train.budget.options import KEEP, WEIGHT

logger = logging.getLogger(__name__)

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


class Stopping(TrainerCallback):
    """Ends a training where a probe has fallen below the budget: where the mean of the last look at each of its parts has.

    One part alone scatters by some points. What the mean sees late, the strength in the end makes up for. Each look is logged as "keep".

    Args:
        parts: how many parts the looks take in turn.
    """

    def __init__(
        self, trainer: Any, keep: float, every: int, look: Callable[[int], float], parts: int
    ) -> None:
        self.trainer, self.keep, self.every, self.look, self.parts = (
            trainer,
            keep,
            every,
            look,
            parts,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = int(state.global_step)
        if step % self.every or step >= state.max_steps:
            return
        due = control.should_log
        self.trainer.log({KEEP: self.look(step // self.every - 1)})
        control.should_log = due  # which a log ends
        kept = recent(state.log_history, self.parts)
        if kept < self.keep:
            logger.info(
                "stopped at step %d of %d: %.1f%% of what the model knew is kept, and %.1f%% were asked for",
                step, state.max_steps, 100 * kept, 100 * self.keep,
            )  # fmt: skip
            control.should_training_stop = control.should_log = True
            control.should_save = False  # a checkpoint from here would go on with one more step


def recent(history: Sequence[dict[str, Any]], parts: int) -> float:
    """The mean of the last looks, one a part; of as many as there are so far."""
    looks = [float(entry[KEEP]) for entry in history if KEEP in entry][-parts:]
    return sum(looks) / len(looks)


def last_weight(history: Sequence[dict[str, Any]], start: float) -> float:
    """The weight that was last logged."""
    return next((float(entry[WEIGHT]) for entry in reversed(history) if WEIGHT in entry), start)
