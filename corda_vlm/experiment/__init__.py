"""An experiment: a YAML file of `configs/`, and the steps from a model and data to a report, which the verbs and the runner share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.experiment.load import load_experiment
    from corda_vlm.experiment.runner import run_experiment
    from corda_vlm.experiment.spec import (
        Calibration,
        Evaluation,
        Experiment,
        NewTask,
        Training,
        Variant,
    )
    from corda_vlm.experiment.study import Study, load_study, run_study

_HOMES = {
    "Calibration": "spec",
    "Evaluation": "spec",
    "Experiment": "spec",
    "NewTask": "spec",
    "Study": "study",
    "Training": "spec",
    "Variant": "spec",
    "load_experiment": "load",
    "load_study": "study",
    "run_experiment": "runner",
    "run_study": "study",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
