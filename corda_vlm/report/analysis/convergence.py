"""How soon a training gets somewhere: the histories of a run, and the steps to a loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from corda_vlm.errors import ForeignFileError
from corda_vlm.report.analysis.curve import Setting
from corda_vlm.report.analysis.results import REFERENCE, Results
from corda_vlm.run_files import HISTORY
from corda_vlm.train.history import read_history

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class History:
    """What one training noted, one entry every few steps.

    Attributes:
        entries: those with a `step` and a `loss`, the mean over the steps since the entry before; a penalty that was
            added to it is not in it.
    """

    method: str
    learning_rate: float
    seed: int | None
    entries: Sequence[Mapping[str, Any]]

    @property
    def steps(self) -> list[int]:
        return [int(entry["step"]) for entry in self.entries]

    @property
    def losses(self) -> list[float]:
        return [float(entry["loss"]) for entry in self.entries]


def read_histories(run_dir: Path) -> dict[str, list[History]]:
    """Method -> its trainings, from `run_dir/<method>/<learning rate>-<seed>/history.jsonl`. One that cannot be read is
    left out with a warning."""
    histories: dict[str, list[History]] = {}
    for file in sorted(run_dir.glob(f"*/*/{HISTORY}")):
        rate, _, seed = file.parent.name.rpartition("-")
        try:
            entries = [e for e in read_history(file) if "loss" in e]
            if not entries:
                raise ForeignFileError("it has no entry with a loss")
            history = History(
                file.parent.parent.name, float(rate), int(seed) if seed.isdigit() else None, entries
            )
        except ValueError as error:
            logger.warning("%s is left out of the training curves: %s", file, error)
            continue
        histories.setdefault(history.method, []).append(history)
    return histories


def running_mean(history: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(entries,) the mean of each loss and those before it, over an eighth of the run; fewer at its start."""
    losses = np.array([float(entry["loss"]) for entry in history])
    window = max(1, round(len(losses) / 8))  # one lucky batch is not yet an arrival
    return np.array([losses[max(0, i + 1 - window) : i + 1].mean() for i in range(len(losses))])


def steps_to_loss(history: Sequence[Mapping[str, Any]], loss: float) -> int | None:
    """The first step at which the running mean of the training loss is at or below `loss`; None where it never is.

    Args:
        history: entries with `step` and `loss`. The answer is the step of an entry, so as fine as those.
    """
    below = np.flatnonzero(running_mean(history) <= loss)
    return int(history[below[0]]["step"]) if len(below) else None


@dataclass(frozen=True)
class Convergence:
    """How soon a method, at its best learning rate, gets to where the reference ends.

    Attributes:
        steps: one number a seed; None where it never gets there.
        shares: the same as shares of the steps that the reference of the same seed takes in all.
    """

    method: str
    setting: Setting
    steps: Sequence[int | None]
    shares: Sequence[float | None]

    def median(self) -> tuple[float, float] | None:
        """Of the steps and of the shares; None where half the seeds or more do not get there."""
        steps = float(np.median([np.inf if s is None else s for s in self.steps]))
        shares = float(np.median([np.inf if s is None else s for s in self.shares]))
        return (steps, shares) if np.isfinite(steps) else None


def convergence(
    results: Results, histories: Mapping[str, Sequence[History]], reference: str = REFERENCE
) -> list[Convergence]:
    """Every method's steps to the reference's final loss, each at its best learning rate (`Results.best_setting`), the
    quickest first.

    The loss aimed at is the reference's of the same seed, as the order of the data is the same there; a seed of which
    the reference has no history is left out. Empty if there are no histories of the reference.
    """

    def best_of(method: str) -> tuple[Setting | None, dict[int | None, History]]:
        setting = results.best_setting(method)
        rate = None if setting is None else setting.learning_rate
        return setting, {
            h.seed: h
            for h in histories.get(method, ())
            if rate is not None and h.learning_rate == float(f"{rate:g}")  # as its folder is named
        }

    _, aims = best_of(reference)
    convergences = []
    for method in results.trained:
        setting, runs = best_of(method)
        seeds = [seed for seed in runs if seed in aims]
        if setting is None or not seeds:
            continue
        steps = [
            steps_to_loss(runs[seed].entries, float(running_mean(aims[seed].entries)[-1]))
            for seed in seeds
        ]
        shares = [
            None if n is None else n / aims[seed].steps[-1]
            for n, seed in zip(steps, seeds, strict=True)
        ]
        convergences.append(Convergence(method, setting, steps, shares))
    return sorted(convergences, key=lambda c: c.median() or (np.inf, np.inf))
