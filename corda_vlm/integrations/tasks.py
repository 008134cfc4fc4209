"""The tasks that lm-eval and lmms-eval are asked for, which both take in one form."""

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
