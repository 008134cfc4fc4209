"""Adding what was measured to a file of scores, and beside it how the base model did on each example.

Two models are told apart more finely on the same examples than by two intervals of their own, as what makes an example hard
for both cancels. So the base model's examples are kept, and the rows of a trained model say how far it is above the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corda_vlm.evaluation.measuring import TaskResult
from corda_vlm.evaluation.scores import Outcome, append_rows, paired_gain, read_rows, score_row
from corda_vlm.jsonl import PATIENCE, append_jsonl, is_number, read_jsonl, wrong_field
from corda_vlm.locks import locked
from corda_vlm.run_files import BASE_EXAMPLES

BASE = "base"


def add_result(path: str | Path, result: TaskResult, **labels: Any) -> list[dict[str, Any]]:
    """Add the scores of one measured task to a file, but for rows that it has already.

    Other processes that add to the file are waited for.

    Args:
        labels: which model it is, as in `score_row`; the method "base" is the model before training.

    Returns:
        the rows that were added.

    Raises:
        CordaError: the file cannot be written.
        ForeignFileError: the file, or the base model's examples beside it, are damaged.
    """
    with locked(path, wait=PATIENCE):
        return _add(Path(path), result, labels)


def _add(path: Path, result: TaskResult, labels: dict[str, Any]) -> list[dict[str, Any]]:
    task, before = result.task.name, read_rows(path, missing_ok=True)
    known = _read_examples(path)
    if labels.get("method") == BASE:
        # First, so that a kill in between leaves no base model without its examples: it is then measured again.
        _keep_examples(path, task, result.outcomes, known)
        gains = {}
    else:
        gains = {
            outcome.metric: paired_gain(outcome, known[task, outcome.metric])
            for outcome in result.outcomes
            if (task, outcome.metric) in known
        }
    rows = []
    for score in result.scores:
        row = score_row(score, **labels)
        if (gain := gains.get(score.metric)) is not None:
            row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
        if row not in before:
            rows.append(row)
    append_rows(path, rows)
    return rows


def examples_path(scores: str | Path) -> Path:
    """Where the base model's examples lie that belong to a file of scores."""
    return Path(scores).with_name(f"{Path(scores).stem}{BASE_EXAMPLES}")


def _keep_examples(
    scores: Path, task: str, outcomes: Sequence[Outcome], known: Mapping[tuple[str, str], Outcome]
) -> None:
    rows = [
        {
            "task": task,
            "metric": outcome.metric,
            "values": _plain(outcome.values),
            "groups": _plain(outcome.groups),
            "weights": _plain(outcome.weights),
            "exp": outcome.exp,
        }
        for outcome in outcomes
        if not _same(outcome, known.get((task, outcome.metric)))
    ]
    append_jsonl(examples_path(scores), rows, "base model's task")


def _read_examples(scores: Path) -> dict[tuple[str, str], Outcome]:
    rows = read_jsonl(examples_path(scores), "base model's task", check=_wrong, missing_ok=True)
    return {
        (row["task"], row["metric"]): Outcome(
            row["metric"],
            np.asarray(row["values"], dtype=np.float64),
            None if row.get("groups") is None else np.asarray(row["groups"], dtype=np.int64),
            weights=None if row.get("weights") is None else np.asarray(row["weights"], dtype=float),
            exp=row["exp"],
        )
        for row in rows
    }


def _wrong(row: Mapping[str, Any]) -> str | None:
    def is_name(value: Any) -> bool:
        return isinstance(value, str)

    def is_numbers(value: Any) -> bool:
        return isinstance(value, list) and all(map(is_number, value))

    needed = {"task": is_name, "metric": is_name, "values": is_numbers}
    needed["exp"] = lambda value: isinstance(value, bool)
    return wrong_field(row, needed, {"groups": is_numbers, "weights": is_numbers})


def _plain(values: np.ndarray | None) -> list[float] | None:
    """As JSON has it; whole numbers, as of right and wrong, in one digit."""
    if values is None:
        return None
    return [int(v) if v == int(v) else float(v) for v in values.tolist()]


def _same(one: Outcome, other: Outcome | None) -> bool:
    return other is not None and all(
        np.array_equal(a, b) if a is not None and b is not None else a is b
        for a, b in (
            (one.values, other.values),
            (one.groups, other.groups),
            (one.weights, other.weights),
        )
    )
