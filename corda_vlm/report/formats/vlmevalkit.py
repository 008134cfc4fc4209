"""VLMEvalKit: tables `MODEL_DATASET_….xlsx` (or .tsv, .json) with a line a sample, and `…_acc.csv` or `…_score.csv`.

`work_dir/MODEL/RUN/` holds one model's tables, a folder `RUN` for each time that it was evaluated. The tables that say of each
sample whether it was right end in `_result` (multiple choice, column `hit`), `_auxmatch` (yes or no, column `score`) or `_results`
(short answers, column `eval_score`). A score that is made otherwise, by a judge or over groups of samples, is read from its
`_acc` or `_score` table alone.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corda_vlm.errors import ForeignFileError
from corda_vlm.files import read_json, read_text, shown
from corda_vlm.report.formats.base import Format, Measure, Measured, Samples, samples_of
from corda_vlm.report.formats.xlsx import read_xlsx

NAME = "VLMEvalKit"
_TABLE = r"\.(?:xlsx|tsv|json)"
_SAMPLES = re.compile(rf"(?P<stem>.+?)(?P<kind>_[^_]+_result|_auxmatch|_results){_TABLE}")
_SCORES = re.compile(r"(?P<stem>.+?)_(?:acc|score)\.(?:csv|json)")
_COLUMN = {"_result": "hit", "_auxmatch": "score", "_results": "eval_score"}
_RUN = re.compile(r"T\d{8}(?:-\d{6}|_G[0-9a-fA-F]+)")
_ALL = "Overall"

Table = Mapping[str, Sequence[str]]
"""Heading -> the cells of its column."""


def find(files: list[Path]) -> list[Path]:
    """Its tables of samples and scores among some files: they begin with the name of the folder that they are in."""
    return [
        one
        for one in files
        if (_SAMPLES.fullmatch(one.name) or _SCORES.fullmatch(one.name)) and _model(one)
    ]


def _model(path: Path) -> str:
    """The name of the model: of the folder of results, in which the folders of runs lie. A file alone must begin with it too."""
    folders = [one for one in path.resolve().parents if not _RUN.fullmatch(one.name)]
    name = folders[0].name if folders else ""
    return name if name and path.name.startswith(f"{name}_") else ""


def read(files: list[Path]) -> list[Measured]:
    """The models of some tables; of a data set evaluated twice the last run counts."""
    by_model: dict[str, dict[str, list[Measure]]] = {}
    for folder in sorted({one.parent for one in files}):
        own = [one for one in files if one.parent == folder]
        model = _model(own[0])
        for stem in dict.fromkeys(_stem(one) for one in own):
            of = [one for one in own if _stem(one) == stem]
            task = stem.removeprefix(f"{model}_")
            if measures := _measures(task, of):
                by_model.setdefault(model, {})[task] = measures
    return [
        Measured(model, (NAME,), tuple(measure for of in tasks.values() for measure in of))
        for model, tasks in by_model.items()
    ]


def _stem(path: Path) -> str:
    match = _SAMPLES.fullmatch(path.name) or _SCORES.fullmatch(path.name)
    assert match is not None
    return match["stem"]


def _measures(task: str, files: list[Path]) -> list[Measure]:
    """The score of one data set: of each split, or of all samples, where its table has no splits."""
    told = {}
    for one in files:
        if _SCORES.fullmatch(one.name):
            told = _overall(read_table(one), one)
    for one in files:
        if match := _SAMPLES.fullmatch(one.name):
            column = _COLUMN[match["kind"] if match["kind"] in _COLUMN else "_result"]
            samples = _samples(read_table(one), column, one)
            chance = 0.5 if column == "score" else None
            value = float(np.mean(samples.outcome.values))
            if not told or any(np.isclose(value, score, atol=1e-4) for score in told.values()):
                return [
                    Measure(
                        task,
                        "accuracy",
                        value,
                        one,
                        n=len(samples.ids),
                        samples=samples,
                        chance=chance,
                    )
                ]
    file = next((one for one in files if _SCORES.fullmatch(one.name)), None)
    return [
        Measure(
            task if split in ("none", "") else f"{task} {split}",
            "score",
            score,
            file or files[0],
            is_share=0 <= score <= 1,
        )
        for split, score in told.items()
    ]


def _overall(table: Table, path: Path) -> dict[str, float]:
    """Split -> the overall score, as a share where it is in per cent."""
    column = next(
        (table[name] for name in (_ALL, "overall", "Final Score Norm") if name in table), None
    )
    if column is None:
        return {}
    splits = table.get("split") or [""] * len(column)
    scores = {}
    for split, text in zip(splits, column, strict=False):
        score = _number(text)
        if score is None:
            raise ForeignFileError(
                f"{shown(path)}: {_ALL} is {text[:50]!r}, and should be a number"
            )
        scores[str(split)] = score
    if _ALL in scores:  # of several splits and all of them together
        scores = {"": scores[_ALL]}
    if any(1 < score <= 100 for score in scores.values()):
        return {split: score / 100 for split, score in scores.items()}
    return scores


def _samples(table: Table, column: str, path: Path) -> Samples:
    if column not in table or "index" not in table:
        raise ForeignFileError(
            f"{shown(path)} has no columns index and {column}; it has {', '.join(table) or 'none'}"
        )
    scores = {}
    for index, text in zip(table["index"], table[column], strict=False):
        score = _number(text)
        if score is None:
            raise ForeignFileError(
                f"{shown(path)}: {column} of the sample {index} is {text[:50]!r}, and should be a number"
            )
        if index in scores:
            raise ForeignFileError(f"{shown(path)} holds the sample {index} twice")
        scores[index] = score
    if not scores:
        raise ForeignFileError(f"{shown(path)} holds no sample; run the evaluation again")
    questions = table.get("question")
    asked = dict(zip(table["index"], questions, strict=False)) if questions else None
    return samples_of(scores, "accuracy", asked)


def _number(text: str) -> float | None:
    words = {"true": 1.0, "false": 0.0}
    try:
        value = words[text.lower()] if text.lower() in words else float(text)
    except ValueError:
        return None
    return value if abs(value) < 1e308 else None


def read_table(path: Path) -> Table:
    """The columns of a table in any of its formats.

    Raises:
        ForeignFileError: it cannot be read, is empty or truncated, or rows are of several lengths.
    """
    if path.suffix == ".json":
        return _columns_of_json(path)
    rows = read_xlsx(path) if path.suffix == ".xlsx" else _separated(path)
    rows = [row for row in rows if any(row)]
    if not rows:
        raise ForeignFileError(f"{shown(path)} is empty; run the evaluation again")
    headings, *rest = rows
    if path.suffix == ".xlsx":  # where cells that are empty need not be there
        rest = [row + [""] * (len(headings) - len(row)) for row in rest]
    for row in rest:
        if len(row) != len(headings):
            raise ForeignFileError(
                f"{shown(path)}: the row that begins with {row[0][:50]!r} has {len(row)} cells, and there are {len(headings)} "
                "headings; it may be truncated: copy it again, or run the evaluation again"
            )
    return {heading: [row[place] for row in rest] for place, heading in enumerate(headings)}


def _separated(path: Path) -> list[list[str]]:
    text = read_text(path, "table")
    before = csv.field_size_limit(max(len(text), 1))  # an answer may be longer than csv's own limit
    try:
        separator = "\t" if path.suffix == ".tsv" else ","
        return list(csv.reader(io.StringIO(text), delimiter=separator))
    except csv.Error as error:
        raise ForeignFileError(
            f"{shown(path)} is no table ({shown(str(error))}); copy it again, or run the evaluation again"
        ) from error
    finally:
        csv.field_size_limit(before)


def _columns_of_json(path: Path) -> Table:
    content: Any = read_json(path, "table")
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        names = dict.fromkeys(name for row in content for name in row)
        return {name: [_text(row.get(name)) for row in content] for name in names}
    if isinstance(content, dict) and all(
        isinstance(column, (list, dict)) for column in content.values()
    ):
        columns = {n: list(c.values()) if isinstance(c, dict) else c for n, c in content.items()}
        if len({len(column) for column in columns.values()}) > 1:
            raise ForeignFileError(
                f"{shown(path)} has columns of several lengths; it may be truncated: run the evaluation again"
            )
        return {name: [_text(cell) for cell in column] for name, column in columns.items()}
    raise ForeignFileError(f"{shown(path)} is no table: a list of rows was expected")


def _text(cell: object) -> str:
    return cell if isinstance(cell, str) else "" if cell is None else json.dumps(cell)


FORMAT = Format(
    NAME, "MODEL_DATASET_acc.csv and MODEL_DATASET_JUDGE_result.xlsx in a folder MODEL", find, read
)
