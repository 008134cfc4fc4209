"""Measuring what a model gained and what it kept: suites, scores with intervals, and the report."""

from corda_vlm.evaluation.comparing import against, choose, compare, dominates
from corda_vlm.evaluation.convergence import steps_to_loss
from corda_vlm.evaluation.encoder import Cache
from corda_vlm.evaluation.frontier import Results
from corda_vlm.evaluation.measuring import TaskResult, evaluate, measure, task_data
from corda_vlm.evaluation.report import leading_finding, summary_table, write_report
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

__all__ = [
    "Cache",
    "Interval",
    "Outcome",
    "Results",
    "Score",
    "Suite",
    "Task",
    "TaskResult",
    "Trained",
    "against",
    "append_rows",
    "bootstrap",
    "check_scales",
    "choose",
    "compare",
    "dominates",
    "done",
    "evaluate",
    "leading_finding",
    "load_suite",
    "load_trained",
    "measure",
    "paired_difference",
    "read_rows",
    "score_row",
    "steps_to_loss",
    "summary_table",
    "task_data",
    "write_report",
]
