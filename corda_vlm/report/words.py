"""The words and numbers that the tables, pictures and sentences of a report share."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from corda_vlm.evaluation.bootstrap import Interval
from corda_vlm.report.analysis.curve import Setting

ABSENT = "–"
OVER_ALL = (
    "Over 100%: on the retention tasks these models do better than the model before training did, through what they learnt or "
    "by the luck of the test examples."
)

ONE_SEED = "one seed: no interval"

PREDICTORS = {
    "forecast": "the forecast of forgetting",
    "kl_new": "the KL to the base on the new task",
    "update_size": "the size of the update",
    "task_change": "the change of the layers' outputs on the new task",
}
"""What may foretell forgetting, by the keys of a row of scores."""

FEW = 4
"""So many methods are read in one picture and one table; of more, each has a panel or a fold of its own."""


def over_all(shares: Iterable[float | None]) -> str:
    """What it means that a kept share is over 100%, where one is shown as that; else nothing."""
    return OVER_ALL if any(share is not None and share >= 1.0005 for share in shares) else ""


def over_all_sentence(shares: Iterable[float | None]) -> str:
    """`over_all` as another sentence of a caption."""
    return f" {sentence}" if (sentence := over_all(shares)) else ""


def shown_of(intervals: Iterable[Interval | None]) -> list[float]:
    """The numbers that a table shows of intervals."""
    return [value for i in intervals if i is not None for value in (i.value, i.high)]


def signed(value: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def percent(value: float, unit: str = "%", digits: int = 1) -> str:
    return ABSENT if np.isnan(value) else f"{100 * value:.{digits}f}{unit}"


def setting_text(setting: Setting) -> str:
    rate = (
        "its only setting"
        if setting.learning_rate is None
        else f"learning rate {setting.learning_rate:g}"
    )
    return rate if setting.scale == 1.0 else f"{rate}, scale {setting.scale:g}"
