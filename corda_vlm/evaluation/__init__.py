"""Measuring what a model gained and what it kept: suites, scores with intervals, and the report."""

from corda_vlm.evaluation.encoder import Cache
from corda_vlm.evaluation.frontier import Results, compare
from corda_vlm.evaluation.measuring import TaskResult, evaluate, measure
from corda_vlm.evaluation.report import summary_table, write_report
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
    "append_rows",
    "bootstrap",
    "check_scales",
    "compare",
    "done",
    "evaluate",
    "load_suite",
    "load_trained",
    "measure",
    "paired_difference",
    "read_rows",
    "score_row",
    "summary_table",
    "write_report",
]
