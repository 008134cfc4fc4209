"""What lm-eval and lmms-eval have alike: the tasks that they are asked for, and the files that they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from corda_vlm.errors import CordaError

Task = str | Mapping[str, Any]
"""The name of a task, or what a task file holds."""


def as_tasks(tasks: str | Sequence[Task]) -> list[str | dict[str, Any]]:
    """A list of tasks, or a text with commas between their names, as the tools' `simple_evaluate` takes it.

    Raises:
        CordaError: not one task.
    """
    each = tasks.split(",") if isinstance(tasks, str) else tasks
    listed = [one.strip() if isinstance(one, str) else dict(one) for one in each]
    if not (named := [one for one in listed if one]):
        raise CordaError("no task is given; name those to measure, as a list or as 'a,b'")
    return named


def save_results(tracker: Any, results: Mapping[str, Any], **aggregated: Any) -> None:
    """The files that the tool's command writes. Its tracker takes samples apart while it writes, so it gets a shallow copy.

    Args:
        tracker: the tool's `EvaluationTracker`.
        results: of its `simple_evaluate`.
        aggregated: further words of the tracker's `save_results_aggregated`.
    """
    samples = {task: [dict(one) for one in of] for task, of in results["samples"].items()}
    others = {key: value for key, value in results.items() if key != "samples"}
    tracker.save_results_aggregated(results=others, samples=samples, **aggregated)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
