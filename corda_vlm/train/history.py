"""The history of a training: `history.jsonl`, an entry every few steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corda_vlm.jsonl import is_number, read_jsonl, wrong_field
from corda_vlm.train.budget.options import KEEP, WEIGHT

PENALTIES = ("anchor", "extra_loss", "distill", "replay", "kl_new", "ewc", "start_decay")
"""Terms of the loss by their names in the logs and in the history; who trains by own code may have others."""


def read_history(path: Path) -> list[dict[str, Any]]:
    """The entries of a `history.jsonl`; a last line cut short by a kill is left out.

    Raises:
        ForeignFileError: another line is no entry.
    """
    return read_jsonl(path, "history entry", check=_not_an_entry, missing_ok=True)


def _not_an_entry(row: Mapping[str, Any]) -> str | None:
    return wrong_field(row, {"step": is_number}, dict.fromkeys(_NUMBERS, is_number))


_NUMBERS = (
    "epoch", "seconds", "loss", "learning_rate", "grad_norm", "samples_per_second", "eval_loss", "eval_accuracy",
    KEEP, WEIGHT, *PENALTIES,
)  # fmt: skip
