"""lmms-eval: `DATE_results.json`, and beside it `DATE_samples_TASK.jsonl` of `--log_samples`, in a folder for each model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from corda_vlm.report.formats import harness
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
    by_folder: dict[Path, list[Path]] = {}
    for one in files:
        by_folder.setdefault(one.parent, []).append(one)
    return [_model(of) for of in by_folder.values()]


def _model(files: list[Path]) -> Measured:
    samples: dict[str, dict[str, harness.Documents]] = {}
    for one in files:
        if match := _SAMPLES.fullmatch(one.name):
            documents = harness.read_documents(one, lambda key, _: key not in _OTHERS)
            samples.setdefault(match["date"], {})[match["task"]] = documents
    runs, name = [], ""
    dated = {match["date"]: one for one in files if (match := _RESULTS.fullmatch(one.name))}
    for date in sorted(dated.keys() | samples.keys()):
        documents = samples.get(date, {})
        if date in dated:
            content = harness.read_results(dated[date])
            name = str(content.get("model_name") or name)
            measures = harness.measures_of(content, documents, dated[date])
        else:
            alone = [harness.measures_of_samples(task, of) for task, of in documents.items()]
            measures = [measure for of in alone for measure in of]
        runs.append([_without_guess(measure) for measure in measures])
    return harness.merged(Path(name).name, NAME, runs)


def _without_guess(measure: Measure) -> Measure:
    """Its tasks let models write also where they choose, so that 0 for what is written would be wrong."""
    if measure.task.startswith(_YES_OR_NO) and "acc" in measure.metric:
        return replace(measure, chance=0.5)
    return replace(measure, chance=None) if measure.chance == 0.0 else measure


FORMAT = Format(
    NAME, "DATE_results.json, with --log_samples also DATE_samples_TASK.jsonl", find, read
)
