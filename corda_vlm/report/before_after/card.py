"""The card of a comparison: the same numbers for programs, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corda_vlm.evaluation.bootstrap import CONFIDENCE, Interval
from corda_vlm.report.before_after.comparison import Comparison, number
from corda_vlm.report.before_after.pairs import Change
from corda_vlm.report.formats.base import Measured

VERSION = 1


def card(
    before: Measured, after: Sequence[Measured], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """All of a comparison: tasks, roles, scores, gains and kept shares, each with its interval where there is one."""
    return {
        "card": "corda_vlm before and after",
        "version": VERSION,
        "confidence": CONFIDENCE,
        "before": {"name": before.name, "tools": list(before.tools)},
        "after": [
            {
                "name": one.name,
                "tools": list(model.tools),
                "kept_share": _number(one.kept),
                "retention_tasks": [kept.task for kept in one.retained],
                "tasks": [_task(of) for of in one.changes],
            }
            for model, one in zip(after, comparisons, strict=True)
        ],
    }


def _task(one: Change) -> dict[str, Any]:
    return {
        "task": one.task,
        "role": one.role,
        "metric": one.before.metric,
        "n": one.before.n,
        "chance": None if one.guessed else one.chance,
        "before": one.before.value,
        "after": one.after.value,
        "gain": _number(one.gain),
        "kept_share": _number(one.kept),
        "interval": one.how,
        "seeds": one.after.seeds or 1,
        "files": [one.before.file.name, one.after.file.name],
    }


def _number(value: Interval | float | None) -> dict[str, float] | None:
    if value is None:
        return None
    bounds = {"low": value.low, "high": value.high} if isinstance(value, Interval) else {}
    return {"value": number(value), **bounds}
