"""Trainings that diverged, noted beside the scores: no report counts them as 0%, and no run trains them again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corda_vlm.jsonl import append_jsonl, is_number, read_jsonl, wrong_field
from corda_vlm.run_files import DIVERGED

TrainingKey = tuple[str, float | None, int | None]
"""Method (a run's variant), learning rate and seed."""


def note_diverged(
    run_dir: str | Path, *, method: str, learning_rate: float | None, seed: int | None, reason: str
) -> None:
    """Add a training to the run's list.

    Args:
        reason: what was not finite, and when.

    Raises:
        CordaError: the file cannot be written.
    """
    row = {"method": method, "learning_rate": learning_rate, "seed": seed, "reason": reason}
    append_jsonl(Path(run_dir) / DIVERGED, [row], "diverged training")


def read_diverged(run_dir: str | Path) -> dict[TrainingKey, str]:
    """The trainings of a run that diverged, each with the reason; none where there is no such file.

    Raises:
        ForeignFileError: a line that is no such training.
    """
    rows = read_jsonl(Path(run_dir) / DIVERGED, "diverged training", check=_wrong, missing_ok=True)
    return {(r["method"], r.get("learning_rate"), r.get("seed")): r.get("reason", "") for r in rows}


def _wrong(row: Mapping[str, Any]) -> str | None:
    return wrong_field(
        row,
        {"method": lambda value: isinstance(value, str) and value != ""},
        {
            "learning_rate": is_number,
            "seed": lambda value: isinstance(value, int),
            "reason": lambda value: isinstance(value, str),
        },
    )
