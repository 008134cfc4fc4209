"""What a model said of each example of a task: noted while it is measured, written as JSON lines, and read back.

Scores say how many answers are right; predictions say which, so that people can look at what a training gained and lost.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_vlm.data.spec import DataSpec
from corda_vlm.errors import CordaError
from corda_vlm.evaluation.tasks.registry import TASK_KINDS
from corda_vlm.jsonl import PATIENCE, is_number, read_jsonl, write_jsonl, wrong_field
from corda_vlm.locks import locked
from corda_vlm.names import listed

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from corda_vlm.evaluation.measure import TaskResult
    from corda_vlm.evaluation.suite import Suite


@dataclass(frozen=True)
class Prediction:
    """What a model said of one example.

    Attributes:
        index: the number of its record in the task's data.
        place: where a person finds the record: the file and the row or line.
        said: the answer, or the name of the predicted class.
        right: the right ones.
        correct: how right it is, from 0 (wrong) to 1 (right); between them where people disagree.
        metric: by which that was judged.
        question: what was asked; None of pictures that are classified.
    """

    index: int
    place: str
    said: str
    right: tuple[str, ...]
    correct: float
    metric: str
    question: str | None = None


@dataclass(frozen=True)
class ModelPrediction(Prediction):
    """A prediction as a file of them tells it: with the task, the records and the model that it is of.

    Attributes:
        task: the task's name in the suite.
        method: what made the model; "base" is the model before training.
        scale: strength of what was trained.
        learning_rate, seed: of the training, where that is told.
        records: how the task's records are read again: their `spec`, the file `beside` which paths are looked for, and their
            `fingerprint`; None where that is not told.
    """

    task: str = ""
    method: str = ""
    scale: float = 1.0
    learning_rate: float | None = None
    seed: int | None = None
    records: Mapping[str, Any] | None = None

    @property
    def model(self) -> tuple[str, float | None, int | None, float]:
        """What tells one model of a run from another: method, learning rate, seed and scale."""
        return (self.method, self.learning_rate, self.seed, self.scale)

    @property
    def example(self) -> tuple[str, str | None, int]:
        """What predictions of several models on the same example have in common."""
        return (
            self.task,
            None if self.records is None else self.records.get("fingerprint"),
            self.index,
        )


def records_told(data: Any, beside: Path | None) -> dict[str, Any]:
    """How records are read again, as `ModelPrediction.records` has it.

    Args:
        data: the records.
        beside: the file that names them.
    """
    usual = {f.name: f.default for f in fields(DataSpec)}
    spec = {
        name: value
        for name, value in asdict(data.spec).items()
        if value != usual[name] and value != {}
    }
    return {
        "spec": spec,
        "beside": None if beside is None else str(Path(beside).absolute()),
        "fingerprint": data.fingerprint,
    }


def add_predictions(path: str | Path, result: TaskResult, **labels: Any) -> int:
    """Add what a model said of the examples of one measured task to a file, in place of what the same model said before.

    The file is replaced as a whole, so that it never holds a part of a task. Other processes that add to it are waited for.

    Args:
        labels: which model it is, as in `score_row`: method, and scale, learning_rate, seed and what else is to be told.

    Returns:
        how many were added; 0 of a kind of task that has none.

    Raises:
        ForeignFileError: the file holds something else.
        CordaError: the file cannot be written.
    """
    if not result.predictions:
        return 0
    shared = {"task": result.task.name, **labels, "records": result.records}
    added = [{**shared, **asdict(one)} for one in result.predictions]
    with locked(path, wait=PATIENCE):
        before = _rows(path, missing_ok=True)
        kept = [row for row in before if _of(row) != _of(shared)]
        write_jsonl(path, [*kept, *added], "prediction")
    return len(added)


def read_predictions(*paths: str | Path) -> list[ModelPrediction]:
    """The predictions of one file or of several, in their order.

    Raises:
        ForeignFileError: no such file, or a line that is not a prediction; names the file and the line.
    """
    return [_told(row) for path in paths for row in _rows(path)]


def _told(row: Mapping[str, Any]) -> ModelPrediction:
    known = {field.name for field in fields(ModelPrediction)}
    values: dict[str, Any] = {name: v for name, v in row.items() if name in known and v is not None}
    return ModelPrediction(**{**values, "right": tuple(row["right"])})


def unpredicted(
    suite: Suite,
    left: Collection[str],
    path: str | Path,
    made_from: Mapping[str, str],
    **model: Any,
) -> list[str]:
    """The tasks that are still to be measured of a model, in the suite's order: those `left` by its scores, and those that can
    have predictions and of which the file has none.

    Args:
        path: of the file, which need not be there.
        made_from: task -> what its scores are made from, for each task in question.
        model: method and scale, and learning_rate and seed of a run's.

    Raises:
        ForeignFileError: as of `read_predictions`.
    """
    there = {
        row["task"]
        for row in _rows(path, missing_ok=True)
        if _of(row) == _of({"task": row["task"], **model})
        and row.get("made_from") == made_from.get(row["task"])
    }
    return [
        task.name
        for task in suite.tasks
        if task.name in left
        or (task.name in made_from and TASK_KINDS[task.kind].predicts and task.name not in there)
    ]


def check_predicting(suite: Suite, tasks: Sequence[str] | None = None) -> None:
    """Say which tasks have no predictions, and raise a `CordaError` where none has.

    Args:
        tasks: names of those that are measured; None for all of the suite.
    """
    chosen = [task for task in suite.tasks if tasks is None or task.name in tasks]
    without = [task for task in chosen if not TASK_KINDS[task.kind].predicts]
    if chosen and len(without) == len(chosen):
        kinds = [kind for kind, declared in TASK_KINDS.items() if declared.predicts]
        raise CordaError(
            f"no task of suite {suite.name} has predictions to write; those of kind {listed(kinds)} have"
        )
    for task in without:
        logger.warning("task %s: a task of kind %s has no predictions", task.name, task.kind)


def check_predictions(path: str | Path) -> None:
    """Raise a `ForeignFileError` for a file that predictions are to be added to and that holds something else."""
    with locked(path, wait=PATIENCE):
        _rows(path, missing_ok=True)


def _of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The task and the model that a row is of."""
    scale = 1.0 if row.get("scale") is None else row["scale"]
    return (row["task"], row["method"], row.get("learning_rate"), row.get("seed"), scale)


def _rows(path: str | Path, *, missing_ok: bool = False) -> list[dict[str, Any]]:
    hint = "make it by corda-vlm evaluate … --predictions FILE"
    return read_jsonl(path, "prediction", check=_wrong, missing_ok=missing_ok, hint=hint)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _are_records(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("spec"), dict):
        return False
    return all(value.get(n) is None or _is_text(value[n]) for n in ("beside", "fingerprint"))


_NEEDED = {
    "task": _is_text, "method": _is_text, "index": _is_index, "place": _is_text, "said": _is_text, "right": _are_texts,
    "correct": _is_share, "metric": _is_text,
}  # fmt: skip
_OPTIONAL = {
    "question": _is_text, "scale": is_number, "learning_rate": is_number, "seed": _is_index, "records": _are_records,
}  # fmt: skip


def _wrong(row: Mapping[str, Any]) -> str | None:
    return wrong_field(row, _NEEDED, _OPTIONAL)


@dataclass(frozen=True)
class Change:
    """An example that one model got right and another did not.

    Attributes:
        before, after: what the two said of it.
    """

    before: ModelPrediction
    after: ModelPrediction

    @property
    def is_gain(self) -> bool:
        return self.after.correct > self.before.correct


def changes(
    before: Iterable[ModelPrediction], after: Iterable[ModelPrediction]
) -> tuple[list[Change], int]:
    """The examples that were right before and wrong after, or the other way round, and how many examples both models were
    measured on.

    An answer is right from half on.
    """
    base = {one.example: one for one in before}
    pairs = [Change(base[one.example], one) for one in after if one.example in base]
    return [c for c in pairs if (c.before.correct >= 0.5) != (c.after.correct >= 0.5)], len(pairs)


def by_model(
    predictions: Sequence[ModelPrediction],
) -> dict[tuple[str, float | None, int | None, float], list[ModelPrediction]]:
    """The predictions of each model, models in the order in which they come."""
    models: dict[tuple[str, float | None, int | None, float], list[ModelPrediction]] = {}
    for one in predictions:
        models.setdefault(one.model, []).append(one)
    return models
