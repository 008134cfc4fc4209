"""What became of a forgetting budget, for the log and for `result.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from corda_vlm.train.budget.kept import Kept


@dataclass(frozen=True)
class Spent:
    """The model that was taken, and what the budget cost.

    Attributes:
        keep: the budget.
        metric: by which the probe told.
        strength: of what was trained; 1 is all of it.
        kept: at this strength.
        kept_at_full: at strength 1.
        task, task_at_full: loss and accuracy on the task's own batches, at this strength and at 1.
        weight: that of the steered term at the end; None where none was steered.
        term: its name.
    """

    keep: float
    metric: str
    strength: float
    kept: Kept
    kept_at_full: Kept
    task: Mapping[str, float] = field(default_factory=dict)
    task_at_full: Mapping[str, float] = field(default_factory=dict)
    weight: float | None = None
    term: str | None = None

    def __str__(self) -> str:
        """A sentence for people."""
        by = f" by {self.metric}" if self.metric != "agreement" else " by agreement with it"
        kept = f"keeps {self.kept} of what it knew{by}, where {self.keep:.0%} was asked for"
        steered = "" if self.term is None else f", with {self.term} at weight {self.weight:.3g}"
        if self.strength == 1.0:
            return f"{kept}, at full strength{steered}; {_told(self.task)}"
        cost = f"at full strength it would be {self.kept_at_full.share:.1%}, {_told(self.task_at_full)}"
        return f"{kept}, at strength {self.strength:.3g}{steered}, {_told(self.task)}; {cost}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "task": dict(self.task), "task_at_full": dict(self.task_at_full)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Spent:
        """Raises TypeError, KeyError or ValueError for what is none."""
        kept = {name: Kept(**content[name]) for name in ("kept", "kept_at_full")}
        found = cls(**{**content, **kept})
        return cls(**{**found.__dict__, "strength": float(found.strength)})


def _told(task: Mapping[str, float]) -> str:
    if "loss" not in task:
        return "nothing of the task was measured"
    if "accuracy" not in task:
        return f"loss {task['loss']:.3g} on the task's batches"
    return f"accuracy {task['accuracy']:.1%} and loss {task['loss']:.3g} on the task's batches"
