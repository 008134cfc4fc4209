"""Files of scores of our own: `corda-vlm evaluate --output` and `corda-vlm run` write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corda_vlm.errors import CordaError
from corda_vlm.evaluation.diverged import read_diverged
from corda_vlm.evaluation.score_file import BASE, gain_of, read_examples, read_rows
from corda_vlm.evaluation.scores import NO_SHARE, Outcome
from corda_vlm.jsonl import parse_row
from corda_vlm.report.formats.base import Format, Measure, Measured, Samples
from corda_vlm.report.formats.seeds import over_seeds
from corda_vlm.run_files import BASE_EXAMPLES, SCORES

NAME = "corda_vlm"
_FALLING = frozenset({"perplexity"})

Row = Mapping[str, Any]


def find(files: list[Path]) -> list[Path]:
    """Files of scores among some files: those called so, and JSON lines whose first line is a score."""
    return [one for one in files if one.name == SCORES or _begins_with_a_score(one)]


def _begins_with_a_score(path: Path) -> bool:
    if path.suffix != ".jsonl" or path.name.endswith(BASE_EXAMPLES):
        return False
    try:
        with path.open("rb") as file:
            row = parse_row(file.readline(100_000))
    except (OSError, CordaError, ValueError):
        return False
    return row.keys() >= {"run", "method", "task", "metric", "value"}


def read(files: list[Path]) -> list[Measured]:
    """The models of each file of scores, the one before training first."""
    return [model for one in files for model in _models(one)]


def _models(path: Path) -> list[Measured]:
    diverged = read_diverged(path.parent) if path.name == SCORES else {}
    examples = read_examples(path)
    by_model: dict[tuple[Any, ...], dict[tuple[str, str], Row]] = {}
    for row in read_rows(path):
        model = (row["method"], row.get("learning_rate"), row.get("seed"), row.get("scale") or 1.0)
        if model[:3] not in diverged:
            by_model.setdefault(model, {})[row["task"], row["metric"]] = row
    by_setting: dict[tuple[Any, ...], list[list[Measure]]] = {}
    for (method, rate, _, scale), rows in by_model.items():
        measures = [_measure(row, path, examples) for row in rows.values()]
        by_setting.setdefault((method, rate, scale), []).append(measures)
    names = _names(list(by_setting))
    models = [
        Measured(names[setting], (NAME,), tuple(over_seeds(seeds)), is_base=setting[0] == BASE)
        for setting, seeds in by_setting.items()
    ]
    return sorted(models, key=lambda one: not one.is_base)


def _names(settings: list[tuple[Any, ...]]) -> dict[tuple[Any, ...], str]:
    """Method, with as much of its setting as tells models apart; seeds are one model."""
    names = {}
    for setting in settings:
        method, rate, scale = setting
        same = [other for other in settings if other[0] == method]
        words = [str(method)]
        words += [f"{rate:g}"] if rate is not None and len({one[1] for one in same}) > 1 else []
        words += [f"scale {scale:g}"] if len({one[2] for one in same}) > 1 else []
        names[setting] = ", ".join(words)
    return names


def _measure(row: Row, path: Path, examples: Mapping[tuple[str, str], Outcome]) -> Measure:
    task, metric = row["task"], row["metric"]
    outcome = examples.get((task, metric)) if row["method"] == BASE else None
    return Measure(
        task=task,
        metric=metric,
        value=float(row["value"]),
        file=path,
        low=row.get("low"),
        high=row.get("high"),
        n=row.get("n"),
        samples=None if outcome is None else _samples(outcome),
        chance=float(row.get("chance") or 0.0),
        is_share=metric not in NO_SHARE,
        rises=metric not in _FALLING,
        role=row.get("role"),
        gain=gain_of(row),
        conditions={} if row.get("n") is None else {"number of examples": str(row["n"])},
    )


def _samples(outcome: Outcome) -> Samples:
    return Samples(tuple(str(place) for place in range(len(outcome.values))), outcome)


FORMAT = Format(NAME, f"{SCORES}, or what corda-vlm evaluate --output names", find, read)
