"""lm-eval: `results_DATE.json`, and beside it `samples_TASK_DATE.jsonl` of `--log_samples`, in a folder for each model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from corda_vlm.report.formats import dated, harness
from corda_vlm.report.formats.base import Format, Measured

NAME = "lm-eval"
_DATE = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d+"
# `--output_path NAME.json` writes NAME_DATE.json in place of results_DATE.json
_RESULTS = re.compile(rf"(?P<stem>.+)_(?P<date>{_DATE})\.json")
_SAMPLES = re.compile(rf"samples_(?P<task>.+)_(?P<date>{_DATE})\.jsonl")


def find(files: list[Path]) -> list[Path]:
    """Its results and samples among some files."""
    results = [one for one in files if _RESULTS.fullmatch(one.name) and harness.is_results(one)]
    return results + [one for one in files if _SAMPLES.fullmatch(one.name)]


def read(files: list[Path]) -> list[Measured]:
    """One model for each folder of results."""
    return dated.models(NAME, files, _RESULTS, _SAMPLES, _is_metric)


def _is_metric(key: str, row: harness.Row) -> bool:
    named: Any = row.get("metrics")
    return key in named if isinstance(named, list) else key not in _OTHERS


_OTHERS = frozenset(
    {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash",
     "target_hash"}
)  # fmt: skip

FORMAT = Format(
    NAME, "results_DATE.json, with --log_samples also samples_TASK_DATE.jsonl", find, read
)
