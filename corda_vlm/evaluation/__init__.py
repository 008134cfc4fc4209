"""Measuring what a model gained and what it kept: suites, tasks, and scores with intervals. Ends at scores.jsonl.

Names are imported on first use: a suite that is misspelled is an error before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.evaluation.answers import ask, classify
    from corda_vlm.evaluation.bootstrap import Interval, paired_difference
    from corda_vlm.evaluation.measure import TaskResult, evaluate, task_data
    from corda_vlm.evaluation.models.encoder import Cache, Encoder
    from corda_vlm.evaluation.predictions import Prediction, changes, read_predictions
    from corda_vlm.evaluation.score_file import add_result, append_rows, done, read_rows, score_row
    from corda_vlm.evaluation.scores import Outcome, Score, value_text
    from corda_vlm.evaluation.suite import Suite, Task, load_suite
    from corda_vlm.evaluation.tasks.base import Evaluator, Setting, TaskContext
    from corda_vlm.evaluation.tasks.registry import (
        TASK_KINDS,
        Metric,
        TaskKind,
        register_metric,
        register_task,
    )

_HOMES = {
    "Cache": "models.encoder",
    "Encoder": "models.encoder",
    "Evaluator": "tasks.base",
    "Interval": "bootstrap",
    "Metric": "tasks.registry",
    "Outcome": "scores",
    "Prediction": "predictions",
    "Score": "scores",
    "Setting": "tasks.base",
    "Suite": "suite",
    "TASK_KINDS": "tasks.registry",
    "Task": "suite",
    "TaskContext": "tasks.base",
    "TaskKind": "tasks.registry",
    "TaskResult": "measure",
    "add_result": "score_file",
    "append_rows": "score_file",
    "ask": "answers",
    "changes": "predictions",
    "classify": "answers",
    "done": "score_file",
    "evaluate": "measure",
    "load_suite": "suite",
    "paired_difference": "bootstrap",
    "read_predictions": "predictions",
    "read_rows": "score_file",
    "register_metric": "tasks.registry",
    "register_task": "tasks.registry",
    "score_row": "score_file",
    "task_data": "measure",
    "value_text": "scores",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
