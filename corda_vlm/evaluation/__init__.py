"""Measuring what a model gained and what it kept: suites, scores with intervals, and the report.


Names are imported on first use: a suite that is misspelt is an error before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.evaluation.comparing import against, choose, compare, dominates
    from corda_vlm.evaluation.convergence import steps_to_loss
    from corda_vlm.evaluation.encoder import Cache
    from corda_vlm.evaluation.findings import leading_finding
    from corda_vlm.evaluation.frontier import Results
    from corda_vlm.evaluation.measuring import TaskResult, evaluate, measure, task_data
    from corda_vlm.evaluation.report import summary_table, write_report
    from corda_vlm.evaluation.score_file import add_result
    from corda_vlm.evaluation.scores import (
        Interval,
        Outcome,
        Score,
        append_rows,
        bootstrap,
        done,
        paired_difference,
        read_rows,
        score_row,
    )
    from corda_vlm.evaluation.suite import Suite, Task, load_suite
    from corda_vlm.evaluation.trained import Trained, check_scales, load_trained

_HOMES = {
    "Cache": "encoder",
    "Interval": "scores",
    "Outcome": "scores",
    "Results": "frontier",
    "Score": "scores",
    "Suite": "suite",
    "Task": "suite",
    "TaskResult": "measuring",
    "Trained": "trained",
    "add_result": "score_file",
    "against": "comparing",
    "append_rows": "scores",
    "bootstrap": "scores",
    "check_scales": "trained",
    "choose": "comparing",
    "compare": "comparing",
    "dominates": "comparing",
    "done": "scores",
    "evaluate": "measuring",
    "leading_finding": "findings",
    "load_suite": "suite",
    "load_trained": "trained",
    "measure": "measuring",
    "paired_difference": "scores",
    "read_rows": "scores",
    "score_row": "scores",
    "steps_to_loss": "convergence",
    "summary_table": "report",
    "task_data": "measuring",
    "write_report": "report",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
