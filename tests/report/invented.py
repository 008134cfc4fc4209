"""Invented scores for the tests of frontier and report. None of these numbers was ever measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corda_vlm.evaluation.score_file import append_rows, score_row
from corda_vlm.evaluation.scores import Score

BASE = {"new": 0.10, "old": 0.44, "older": 0.30}
CHANCE = {"new": 0.10, "old": 0.04, "older": 0.0, "new-val": 0.10}
ROLES = {"new": "gain", "old": "retention", "older": "retention", "new-val": "selection"}


def rows_of(
    method: str, values: Mapping[str, float], *, rate: float | None = None, seed: int | None = None,
    scale: float = 1.0,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one model, one for each task."""
    return [
        score_row(
            Score(task, "top1", value, value - 0.02, value + 0.02, 500, ROLES[task], CHANCE[task]),
            run="invented", method=method, learning_rate=rate, seed=seed, scale=scale, steps=100, seconds=1.0,
        )
        for task, value in values.items()
    ]  # fmt: skip


def at(task: float, kept: float) -> dict[str, float]:
    """Scores of a model with this task accuracy and this kept share on both retention tasks."""
    old = {t: CHANCE[t] + kept * (BASE[t] - CHANCE[t]) for t in ("old", "older")}
    return {"new": task, **old}


def study(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], seeds: int = 2
) -> list[dict[str, Any]]:
    """Rows of a base model and of methods given as (learning rate, task, kept); seeds differ by a hair."""
    rows = rows_of("base", BASE)
    for method, points in curves.items():
        for rate, task, kept in points:
            for seed in range(seeds):
                off = 0.01 * (seed - (seeds - 1) / 2)
                rows += rows_of(method, at(task + off, kept - off), rate=rate, seed=seed)
    return rows


# method -> (how much it keeps where it has learnt all it can, how fast it learns): for a large study
MANY = {
    "lora": (0.18, 1.0), "corda-kpm": (0.42, 1.0), "corda-ipm": (0.10, 1.3), "dora": (0.20, 1.0), "pissa": (0.05, 1.2),
    "milora": (0.22, 1.1), "olora": (0.08, 1.2), "full": (0.10, 1.4), "sc-lora": (0.38, 1.0), "lora-null": (0.40, 0.9),
    "lora-null-frozen": (0.55, 0.7), "eva": (0.06, 1.3), "mica": (0.25, 0.8), "corda-kpm-frozen": (0.50, 0.8),
    "kpm-dynamic-rank": (0.45, 1.0), "lora-anchor": (0.80, 0.95), "kpm-anchor": (0.86, 1.0), "linear-probe": (1.0, 0.3),
}  # fmt: skip


def large_study(
    methods: Sequence[str] = tuple(MANY),
    seeds: int = 3,
    scales: Sequence[float] = (0.25, 0.5, 0.75),
) -> list[dict[str, Any]]:
    """Rows of a study as large as a real one: four learning rates, scaled after training, with a validation task and
    the forecast of forgetting. Accuracy saturates in the learning rate, knowledge falls; scales bend outwards."""
    rows = rows_of("base", {**BASE, "new-val": 0.11})
    for number, method in enumerate(methods):
        floor, speed = MANY[method]
        for index, rate in enumerate((5e-4, 1e-3, 2e-3, 4e-3)):
            for seed in range(seeds):
                luck = 0.012 * math.sin(7.0 * number + 3.0 * index + 11.0 * seed)
                learnt = 1.0 - math.exp(-speed * 0.55 * (index + 1))
                for scale in (1.0, *scales):
                    task = 0.10 + 0.78 * learnt * (1.0 - (1.0 - scale) ** 2) + luck * scale
                    lost = (1.0 - floor) * learnt**1.5 * scale**1.6
                    values = {**at(task, 1.0 - lost - 0.7 * luck * scale), "new-val": task + luck}
                    found = rows_of(method, values, rate=rate, seed=seed, scale=scale)
                    rows += [
                        {**row, "forecast": 0.2 * (lost + 0.02 * (1 + math.sin(number))) ** 2}
                        for row in found
                    ]
    return rows


DEMO = {
    "corda-kpm": [(1e-3, 0.62, 0.83), (2e-3, 0.76, 0.58), (4e-3, 0.84, 0.28)],
    "lora": [(1e-3, 0.52, 0.55), (2e-3, 0.71, 0.37), (4e-3, 0.80, 0.20)],
    "full": [(1e-4, 0.60, 0.62), (3e-4, 0.79, 0.31), (1e-3, 0.90, 0.08)],
}


def write_run(folder: Path, rows: Sequence[Mapping[str, Any]], histories: bool = False) -> Path:
    """A run's folder with these scores."""
    append_rows(folder / "scores.jsonl", rows)
    facts = {
        "title": "Invented run",
        "command": "corda-vlm run <demo> & more",
        "machine": {"cpu": "none"},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    if histories:
        for method, points in DEMO.items():
            for rate, _, _ in points:
                for seed in range(2):
                    file = folder / method / f"{rate:g}-{seed}" / "history.jsonl"
                    file.parent.mkdir(parents=True)
                    losses = [
                        2.3 * (1 - rate * 100) ** (0.05 * s) + 0.1 * ((s * 7 + seed) % 5) / 5
                        for s in range(160)
                    ]
                    lines = [json.dumps({"step": s, "loss": loss}) for s, loss in enumerate(losses)]
                    file.write_text("\n".join(lines) + "\n")
    return folder
