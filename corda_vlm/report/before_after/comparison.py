"""One model after training against the one before: every task, and the kept share over all that were known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation.bootstrap import Interval, interval_of_draws
from corda_vlm.files import shown
from corda_vlm.names import quoted
from corda_vlm.report.before_after.options import Roles
from corda_vlm.report.before_after.pairs import Change, change
from corda_vlm.report.formats.base import Measure, Measured


@dataclass(frozen=True)
class Comparison:
    """One model against the one before training.

    Attributes:
        name: of the model.
        changes: a task each, those of gain first.
    """

    name: str
    changes: tuple[Change, ...]

    @property
    def gained(self) -> tuple[Change, ...]:
        """What was to be learned."""
        return tuple(one for one in self.changes if one.role == "gain")

    @property
    def retained(self) -> tuple[Change, ...]:
        """What was to be kept, and was known before."""
        return tuple(c for c in self.changes if c.role == "retention" and c.kept is not None)

    @property
    def kept(self) -> Interval | float | None:
        """The mean of the kept shares; with an interval where every one of them has one."""
        counted = self.retained
        if not counted:
            return None
        value = float(np.mean([number(one.kept) for one in counted if one.kept is not None]))
        draws = [one.draws for one in counted if one.draws is not None]
        if len(draws) < len(counted):
            return value
        means = np.mean(np.stack(draws), axis=0)
        return interval_of_draws(value, means[~np.isnan(means)])


def number(value: Interval | float) -> float:
    """The value itself, with or without an interval."""
    return value.value if isinstance(value, Interval) else value


def compare_models(before: Measured, after: Sequence[Measured], roles: Roles) -> list[Comparison]:
    """Each model against the one before training, on the same tasks.

    Raises:
        UnknownNameError: a role, chance or metric names a task or metric that no results have.
        CordaError: a task is in one of the results and not in another, or was not measured alike.
        DataError: the samples of a task do not pair.
    """
    tasks = _tasks(before, after, roles)
    _check_named(tasks, roles)
    comparisons = []
    for model in after:
        found = []
        for seed, task in enumerate(tasks):
            first, second = _pair(before, model, task, roles)
            role = _role(task, first, second, roles)
            level = (roles.chance or {}).get(
                task, first.chance if second.chance is None else second.chance
            )
            found.append(change(first, second, role, level, seed=seed))
        found.sort(key=lambda one: one.role != "gain")
        comparisons.append(Comparison(model.name, tuple(found)))
    return comparisons


def _tasks(before: Measured, after: Sequence[Measured], roles: Roles) -> list[str]:
    """The tasks that are compared: those that are named, or all but the validation splits."""
    models = [before, *after]
    every = dict.fromkeys(task for model in models for task in model.tasks)
    named = [*(roles.gain or ()), *(roles.retention or ())]
    for pattern in named:
        if not any(fnmatchcase(task, pattern) for task in every):
            raise UnknownNameError("task", pattern, every, "These are in the results.")
    if roles.retention is not None:
        every = [task for task in every if _is_named(task, named)]
    tasks = [task for task in every if not _is_selection(task, models) or _is_named(task, named)]
    for model in models:
        if absent := [task for task in tasks if task not in model.tasks]:
            first = model.measures[0].file
            raise CordaError(
                f"{model.name!r} has no results for {quoted(absent)}, which others here have ({shown(first)}); evaluate it on "
                "them too, or name the tasks to compare with --gain and --retention"
            )
    return tasks


def _is_selection(task: str, models: Sequence[Measured]) -> bool:
    return any((of := model.of(task)) is not None and of.role == "selection" for model in models)


def _is_named(task: str, patterns: Sequence[str] | None) -> bool:
    return any(fnmatchcase(task, pattern) for pattern in patterns or ())


def _check_named(tasks: Sequence[str], roles: Roles) -> None:
    for task in [*(roles.chance or ()), *(roles.metrics or ())]:
        if task not in tasks:
            raise UnknownNameError("task", task, tasks, "Its chance or metric is given.")


def _role(task: str, before: Measure, after: Measure, roles: Roles) -> str:
    if _is_named(task, roles.gain):
        return "gain"
    if _is_named(task, roles.retention):
        return "retention"
    return "gain" if "gain" in (before.role, after.role) else "retention"


def _pair(before: Measured, after: Measured, task: str, roles: Roles) -> tuple[Measure, Measure]:
    """The measures of a task by one metric: the one that is named, or the first before that is there after."""
    common = [one for one in before.metrics(task) if one in after.metrics(task)]
    wanted = (roles.metrics or {}).get(task)
    if wanted is not None and wanted not in common:
        raise UnknownNameError(f"metric of {task}", wanted, common)
    if not common:
        raise CordaError(
            f"{task!r} was measured by {quoted(before.metrics(task))} before and by {quoted(after.metrics(task))} after; "
            "evaluate both by one metric"
        )
    first, second = before.of(task, wanted or common[0]), after.of(task, wanted or common[0])
    assert first is not None
    assert second is not None
    return first, second
