"""What a tool measured of a model, whichever tool it was: tasks, their metrics, and where told each sample's score."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from corda_vlm.errors import ForeignFileError, brief
from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.evaluation.scores import Outcome
from corda_vlm.files import plain_file, read_json, shown, unreadable


@dataclass(frozen=True)
class Samples:
    """One metric's score on each sample of a task.

    Attributes:
        ids: what tells the samples apart within their task.
        outcome: their scores, in this order.
        documents: what each sample asks, as a digest, where the tool tells it: equal ids of two models are then known to be
            of the same sample.
    """

    ids: tuple[str, ...]
    outcome: Outcome
    documents: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Measure:
    """One metric of one task, of one model.

    Attributes:
        task, metric: as the tool calls them.
        value: a share in [0, 1] where `is_share`, else a number of any unit.
        file: where it was read.
        low, high: its own 95 % interval over samples, where the tool tells it or its standard error.
        n: how many samples there were.
        samples: the score on each, where the tool tells it.
        chance: what guessing gives; None where the tool does not tell enough to know.
        is_share: it is written in per cent.
        rises: more is better.
        role: "gain", "retention" or "selection", where the tool knows roles.
        gain: how far it lies above the model before training, paired over samples, where the file itself tells it.
        seeds: of how many trainings, which differ in their seed alone, it is the mean; None of one training.
        conditions: what has to be equal for two numbers to be of one measurement, e.g. the number of shots.
        settings: what need not be equal, but is worth a word where it is not, e.g. the chat template.
    """

    task: str
    metric: str
    value: float
    file: Path
    low: float | None = None
    high: float | None = None
    n: int | None = None
    samples: Samples | None = None
    chance: float | None = None
    is_share: bool = True
    rises: bool = True
    role: str | None = None
    gain: Interval | None = None
    seeds: int | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def interval(self) -> Interval | None:
        """Its own interval, where there is one."""
        if self.low is None or self.high is None:
            return None
        return Interval(self.value, self.low, self.high)


@dataclass(frozen=True)
class Measured:
    """What was measured of one model.

    Attributes:
        name: of the model, as its files call it.
        tools: the formats that it was read from.
        measures: in the order of the files; of a task's metrics the one that counts is first.
        is_base: the files say that this is the model before training.
    """

    name: str
    tools: tuple[str, ...]
    measures: tuple[Measure, ...]
    is_base: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, each once."""
        return tuple(dict.fromkeys(measure.task for measure in self.measures))

    def of(self, task: str, metric: str | None = None) -> Measure | None:
        """A task's measure: of the metric that is named, or else the first."""
        for measure in self.measures:
            if measure.task == task and metric in (None, measure.metric):
                return measure
        return None

    def metrics(self, task: str) -> list[str]:
        """The metrics of a task."""
        return [measure.metric for measure in self.measures if measure.task == task]


@dataclass(frozen=True)
class Format:
    """How the results of one tool lie on a disk.

    Attributes:
        name: of the tool.
        files: what its files are called and how one gets them, for messages.
        find: the files of this format among the plain files of a folder, or the one file that was named; none where there
            are none. It looks at names, and into small files where names do not tell.
        read: what those files hold, one `Measured` for each model.
    """

    name: str
    files: str
    find: Callable[[list[Path]], list[Path]]
    read: Callable[[list[Path]], list[Measured]]


def read_lines(path: Path, what: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, one after another: such files may be large. NaN is let pass.

    Raises:
        ForeignFileError: it cannot be read, holds nothing, or a line is no object; names the file and the line.
    """
    plain_file(path, f"file of {what}s")
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _object(path, number, line, what)
    except OSError as cause:
        raise unreadable(path, cause, ForeignFileError) from cause
    if number == 0:
        raise ForeignFileError(f"{shown(path)} is empty; run the evaluation again")


def _object(path: Path, number: int, line: bytes, what: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else "; the file ends in the middle of it"
        raise ForeignFileError(
            f"{shown(path)}, line {number}, is not a {what} ({shown(str(error))}){cut}. Run the evaluation again, or copy the "
            "whole file"
        ) from error
    if not isinstance(row, dict):
        raise ForeignFileError(f"{shown(path)}, line {number}, is not a {what}, but {brief(row)}")
    return row


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ForeignFileError: no such file, empty or truncated, or no object.
    """
    if plain_file(path, f"file of {what}").stat().st_size == 0:
        raise ForeignFileError(f"{shown(path)} is empty; run the evaluation again")
    content = read_json(path, what)
    if not isinstance(content, dict):
        raise ForeignFileError(f"{shown(path)} is no {what}: it holds {brief(content)}")
    return content


def number_of(value: Any) -> float | None:
    """A finite number, or a truth value as 1 or 0; None of anything else."""
    if isinstance(value, (bool, int, float)) and abs(value) < 1e308:  # NaN is not below
        return float(value)
    return None


def samples_of(
    scores: Mapping[str, float],
    metric: str,
    documents: Mapping[str, str] | None = None,
    classes: Mapping[str, str] | None = None,
) -> Samples:
    """Samples from id -> score.

    Args:
        documents: id -> digest of what is asked.
        classes: id -> the class within which the mean is taken first, e.g. the subtask of a group.
    """
    ids = tuple(scores)
    groups = None
    if classes is not None:
        names = sorted(set(classes.values()))
        groups = np.array([names.index(classes[one]) for one in ids], dtype=np.int64)
    outcome = Outcome(metric, np.array([scores[one] for one in ids], dtype=np.float64), groups)
    digests = tuple(documents[one] for one in ids) if documents else None
    return Samples(ids, outcome, digests)
