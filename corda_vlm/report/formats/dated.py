"""Results and samples of lm-eval's kind, in files whose names tell when they were measured: a model for each folder of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from corda_vlm.report.formats import harness
from corda_vlm.report.formats.base import Measure, Measured


def models(
    tool: str,
    files: list[Path],
    results: re.Pattern[str],
    samples: re.Pattern[str],
    is_metric: Callable[[str, harness.Row], bool],
    adjusted: Callable[[Measure], Measure] = lambda measure: measure,
) -> list[Measured]:
    """One model for each folder of results.

    Args:
        tool: that wrote them.
        results, samples: of the files' names, with groups `date`, and `task` of samples.
        is_metric: as of `harness.read_documents`.
        adjusted: what is made of each measure.
    """
    by_folder: dict[Path, list[Path]] = {}
    for one in files:
        by_folder.setdefault(one.parent, []).append(one)
    return [_model(tool, of, results, samples, is_metric, adjusted) for of in by_folder.values()]


def _model(
    tool: str,
    files: list[Path],
    results: re.Pattern[str],
    samples: re.Pattern[str],
    is_metric: Callable[[str, harness.Row], bool],
    adjusted: Callable[[Measure], Measure],
) -> Measured:
    by_date: dict[str, dict[str, harness.Documents]] = {}
    for one in files:
        if match := samples.fullmatch(one.name):
            of_date = by_date.setdefault(match["date"], {})
            of_date[match["task"]] = harness.read_documents(one, is_metric)
    runs, name = [], ""
    dated = {match["date"]: one for one in files if (match := results.fullmatch(one.name))}
    for date in sorted(dated.keys() | by_date.keys()):
        documents = by_date.get(date, {})
        if date in dated:
            content = harness.read_results(dated[date])
            name = str(content.get("model_name") or name)
            measures = harness.measures_of(content, documents, dated[date])
        else:
            alone = [harness.measures_of_samples(task, of) for task, of in documents.items()]
            measures = [measure for of in alone for measure in of]
        runs.append([adjusted(measure) for measure in measures])
    return harness.merged(Path(name).name, tool, runs)
