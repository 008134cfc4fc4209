"""Adding what was measured to a file of scores, and beside it how the base model did on each example.

Two models are told apart more finely on the same examples than by two intervals of their own, as what makes an example hard
for both cancels. So the base model's examples are kept, and the rows of a trained model say how far it is above the base.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.evaluation.scores import BASE, TASK_ROLES, Outcome, Score, paired_gain
from corda_vlm.jsonl import PATIENCE, append_jsonl, is_number, read_jsonl, wrong_field
from corda_vlm.locks import locked
from corda_vlm.run_files import BASE_EXAMPLES

if TYPE_CHECKING:
    from corda_vlm.evaluation.measure import TaskResult
    from corda_vlm.evaluation.suite import Suite


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
    task = result.task.name
    before = [_without_source(row) for row in read_rows(path, missing_ok=True)]
    known = read_examples(path)
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
        if _without_source(row) not in before:
            rows.append(row)
    append_rows(path, rows)
    return rows


def _without_source(row: Mapping[str, Any]) -> dict[str, Any]:
    """Rows that tell the same score are equal, whether they tell what it was made from or, as those of old, do not."""
    return {name: value for name, value in row.items() if name != "made_from"}


def check_scores(path: str | Path) -> None:
    """Raise a `ForeignFileError` for a file that scores are to be added to and that holds something else."""
    with locked(path, wait=PATIENCE):
        read_rows(path, missing_ok=True)


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


def read_examples(scores: Path) -> dict[tuple[str, str], Outcome]:
    """(task, metric) -> what the base model did on each example, beside a file of scores; nothing where it is not told."""
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


def score_row(
    score: Score,
    *,
    run: str,
    method: str,
    learning_rate: float | None = None,
    seed: int | None = None,
    scale: float = 1.0,
    steps: int | None = None,
    seconds: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One row of scores.jsonl. `method` is "base" for the model before training."""
    return {
        "run": run, "method": method, "learning_rate": learning_rate, "seed": seed,
        "scale": scale, "steps": steps, "seconds": seconds, **asdict(score), **more,
    }  # fmt: skip


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a scores file in one write, see `append_jsonl`.

    Raises:
        CordaError: a value is NaN, Inf or no JSON; or the disk is full.
    """
    append_jsonl(path, rows, "score")


def read_rows(path: str | Path, *, missing_ok: bool = False) -> list[dict[str, Any]]:
    """The rows of a scores file. A last line without an end, torn by a kill, is reported and dropped.

    Raises:
        ForeignFileError: no such file (unless `missing_ok`), or a line that is not a score.
    """
    hint = "evaluate a model into it first"
    return read_jsonl(path, "score", check=_not_a_score, missing_ok=missing_ok, hint=hint)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: Any) -> bool:
    return is_number(value) and value == int(value)


_NEEDED = {"method": _is_name, "task": _is_name, "metric": _is_name, "value": is_number}
_OPTIONAL = {
    "learning_rate": is_number, "seed": _is_count, "scale": is_number, "low": is_number, "high": is_number,
    "n": _is_count, "steps": _is_count, "chance": is_number, "forecast": is_number, "gain": is_number,
    "gain_low": is_number, "gain_high": is_number, "kl_new": is_number, "update_size": is_number,
    "task_change": is_number,
    "role": lambda role: isinstance(role, str) and role in TASK_ROLES,
}  # fmt: skip


def _not_a_score(row: Mapping[str, Any]) -> str | None:
    return wrong_field(row, _NEEDED, _OPTIONAL)


def rows_of(
    rows: Sequence[Mapping[str, Any]],
    *,
    method: str,
    learning_rate: float | None = None,
    seed: int | None = None,
    scale: float = 1.0,
) -> list[Mapping[str, Any]]:
    """The rows of one model at one strength."""
    wanted = (method, learning_rate, seed, scale)
    return [
        row
        for row in rows
        if (
            row["method"],
            row.get("learning_rate"),
            row.get("seed"),
            1.0 if row.get("scale") is None else row["scale"],
        )
        == wanted
    ]


def done(rows: Sequence[Mapping[str, Any]], **model: Any) -> set[tuple[str, str]]:
    """The (task, metric) pairs already measured of one model, so that a run resumes; `model` as in `rows_of`."""
    return {(row["task"], row["metric"]) for row in rows_of(rows, **model)}


def tasks_left(
    suite: Suite, rows: Sequence[Mapping[str, Any]], among: Collection[str], **model: Any
) -> list[str]:
    """Names of the tasks, of those in `among`, that lack scores of one model at one strength; `model` as in `rows_of`."""
    return [name for name in suite.remaining(done(rows, **model)) if name in among]


def gain_of(row: Mapping[str, Any]) -> Interval | None:
    """The `paired_gain` that a row of scores tells, None where it has none."""
    return _interval_in(row, "gain", "gain_low", "gain_high")


def interval_of(row: Mapping[str, Any]) -> Interval | None:
    """The score of a row with its interval, None where it has none."""
    return _interval_in(row, "value", "low", "high")


def _interval_in(row: Mapping[str, Any], *names: str) -> Interval | None:
    value, low, high = (row.get(name) for name in names)
    if value is None or low is None or high is None:
        return None
    return Interval(float(value), float(low), float(high))
