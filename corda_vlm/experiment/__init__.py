"""An experiment: a YAML file of `configs/`, and the steps from a model and data to a report, which the verbs and the runner share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.experiment.load import load_experiment, load_study
    from corda_vlm.experiment.spec import (
        Calibration,
        Evaluation,
        Experiment,
        NewTask,
        Study,
        Training,
        Variant,
    )
    from corda_vlm.experiment.study import run

_HOMES = {
    "Calibration": "spec",
    "Evaluation": "spec",
    "Experiment": "spec",
    "NewTask": "spec",
    "Study": "spec",
    "Training": "spec",
    "Variant": "spec",
    "load_experiment": "load",
    "load_study": "load",
    "run": "study",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
