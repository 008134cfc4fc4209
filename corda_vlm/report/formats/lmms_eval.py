"""lmms-eval: `DATE_results.json`, and beside it `DATE_samples_TASK.jsonl` of `--log_samples`, in a folder for each model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from corda_vlm.report.formats import dated, harness
from corda_vlm.report.formats.base import Format, Measure, Measured

NAME = "lmms-eval"
_RESULTS = re.compile(r"(?P<date>\d{8}_\d{6})_results\.json")
_SAMPLES = re.compile(r"(?P<date>\d{8}_\d{6})_samples_(?P<task>.+)\.jsonl")
_OTHERS = frozenset(
    {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "doc_hash", "input", "input_media",
     "token_counts", "submission"}
)  # fmt: skip
_YES_OR_NO = ("pope",)


def find(files: list[Path]) -> list[Path]:
    """Its results and samples among some files."""
    return [one for one in files if _RESULTS.fullmatch(one.name) or _SAMPLES.fullmatch(one.name)]


def read(files: list[Path]) -> list[Measured]:
    """One model for each folder of results."""
    return dated.models(NAME, files, _RESULTS, _SAMPLES, _is_metric, _without_guess)


def _is_metric(key: str, _: harness.Row) -> bool:
    return key not in _OTHERS


def _without_guess(measure: Measure) -> Measure:
    """Its tasks let models write also where they choose, so that 0 for what is written would be wrong."""
    if measure.task.startswith(_YES_OR_NO) and "acc" in measure.metric:
        return replace(measure, chance=0.5)
    return replace(measure, chance=None) if measure.chance == 0.0 else measure


FORMAT = Format(
    NAME, "DATE_results.json, with --log_samples also DATE_samples_TASK.jsonl", find, read
)
