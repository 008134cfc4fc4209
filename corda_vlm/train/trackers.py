"""Trackers of experiments, through transformers: the loss, its terms and what the probe keeps, as curves beside the history."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from corda_vlm.errors import CordaError

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}  # fmt: skip
"""Tracker -> the packages of which one must be there."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise a `CordaError` for a tracker whose package is not installed."""
    for name in names:
        packages = _PACKAGES[name]
        if not any(find_spec(package) for package in packages):
            raise CordaError(
                f"report_to names {name}, and its package is not installed: pip install {packages[0]}"
            )


@contextmanager
def tracked(names: Sequence[str]) -> Iterator[None]:
    """Within it one training runs: a W&B run that it opened is closed, as the next training in this process would go on
    in it. One that the caller opened stays open."""
    before = _wandb_run() if "wandb" in names else None
    try:
        yield
    finally:
        if "wandb" in names and before is None and _wandb_run() is not None:
            sys.modules["wandb"].finish()


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)
