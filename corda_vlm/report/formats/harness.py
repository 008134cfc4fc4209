"""What lm-eval and lmms-eval, which grew out of it, have in common: a JSON of results, and JSON lines of samples.

Of the results `results` has for each task its metrics as "metric,filter", and for each group of tasks the aggregate over
its subtasks, which `group_subtasks` lists. A sample has the number of its document, the name of its filter, and its score by
each metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from corda_vlm.errors import ForeignFileError
from corda_vlm.files import shown
from corda_vlm.report.formats.base import (
    Measure,
    Measured,
    Samples,
    number_of,
    read_lines,
    read_object,
    samples_of,
)

Row = Mapping[str, Any]
NORMAL = 1.96
"""Standard errors on either side that hold 95 % of a normal distribution."""

_ERRORS = ("_stderr", "_stderr_clt", "_stderr_clustered")
_ANY = "*"  # the filter of samples that name none
_CHOSEN = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")


@dataclass(frozen=True)
class Documents:
    """The samples of one task, as far as they are needed: document -> what was scored.

    Attributes:
        scores: "metric,filter" -> document -> score.
        digests: document -> digest of what was asked.
        choices: document -> how many answers there were to choose from; empty where none are.
        file: where they were read.
    """

    scores: Mapping[str, Mapping[str, float]]
    digests: Mapping[str, str]
    choices: Mapping[str, int]
    file: Path

    def of(self, key: str) -> Samples | None:
        """The samples by one metric, where there are any."""
        scores = self.scores.get(key) or self.scores.get(_any_filter(key))
        if not scores:
            return None
        digests = self.digests if self.digests.keys() >= scores.keys() else None
        return samples_of(scores, plain_key(key), digests)

    @property
    def chance(self) -> float | None:
        """What guessing among the answers gives; None where nothing was chosen from."""
        return float(np.mean([1 / n for n in self.choices.values()])) if self.choices else None


def is_results(path: Path) -> bool:
    """Does a JSON file hold results by task and metric? One that is damaged does, so that its error is told."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return False
    return b'"results"' in start.partition(b":")[0] or not start.strip()


def plain_key(key: str) -> str:
    """ "acc" of "acc,none": the filter is told where there is one."""
    return key.removesuffix(",none").removesuffix(f",{_ANY}")


def _any_filter(key: str) -> str:
    return f"{key.partition(',')[0]},{_ANY}"


def read_documents(path: Path, is_metric: Callable[[str, Row], bool]) -> Documents:
    """The samples of a file.

    Args:
        is_metric: is this key of a sample a metric?

    Raises:
        ForeignFileError: empty, truncated, no samples, or one document twice.
    """
    scores: dict[str, dict[str, float]] = {}
    ambiguous: set[str] = set()
    digests: dict[str, str] = {}
    choices: dict[str, int] = {}
    for row in read_lines(path, "sample"):
        if "doc_id" not in row:
            raise ForeignFileError(
                f"{shown(path)} holds samples without a doc_id; write them with --log_samples"
            )
        document, filter_name = str(row["doc_id"]), str(row.get("filter", _ANY))
        if (digest := row.get("doc_hash")) is not None:
            digests[document] = str(digest)
        answers = row.get("filtered_resps")
        if isinstance(answers, list) and len(answers) > 1:
            choices[document] = len(answers)
        for key, value in row.items():
            if isinstance(value, dict):  # lmms-eval's: a score and what it was made from
                value = value.get("score")
            if not is_metric(key, row) or (score := number_of(value)) is None:
                continue
            by_document = scores.setdefault(f"{key},{filter_name}", {})
            if (
                document in by_document and filter_name == _ANY
            ):  # of several filters, which cannot be told apart
                ambiguous.add(f"{key},{filter_name}")
            elif document in by_document:
                raise ForeignFileError(
                    f"{shown(path)} holds the document {document} twice; it may be of two runs: evaluate into a new folder"
                )
            by_document[document] = score
    known = {key: of for key, of in scores.items() if key not in ambiguous}
    return Documents(known, digests, choices, path)


def read_results(path: Path) -> dict[str, Any]:
    """The content of a file of results.

    Raises:
        ForeignFileError: empty, truncated, or no results.
    """
    content = read_object(path, "results")
    results = content.get("results")
    if not isinstance(results, dict) or not all(isinstance(one, dict) for one in results.values()):
        raise ForeignFileError(f"{shown(path)} has no mapping `results` of tasks and their metrics")
    return content


def measures_of(
    content: Mapping[str, Any], documents: Mapping[str, Documents], file: Path
) -> list[Measure]:
    """Every metric of every task; a group that has a score of its own counts as one task, in place of its subtasks.

    Args:
        content: of a file of results.
        documents: task -> its samples.
    """
    groups = _groups(content)
    measures = []
    for task, metrics in content["results"].items():
        within = groups.get(task, [task])
        for key, value in metrics.items():
            number = number_of(value)
            metric, _, filter_name = key.partition(",")
            if number is None or not filter_name or metric.endswith(_ERRORS):
                continue
            error = number_of(metrics.get(f"{metric}_stderr,{filter_name}"))
            parts = {one: documents[one] for one in within if one in documents}
            measures.append(_measure(content, task, key, number, error, file, parts, within))
    return _without_subtasks(measures, groups)


def _measure(
    content: Mapping[str, Any],
    task: str,
    key: str,
    value: float,
    error: float | None,
    file: Path,
    parts: Mapping[str, Documents],
    within: list[str],
) -> Measure:
    samples = _pooled(key, parts, within, value)
    metric = key.partition(",")[0]
    higher = content.get("higher_is_better")
    better = higher.get(task, {}) if isinstance(higher, dict) else {}
    rises = better.get(metric) is not False if isinstance(better, dict) else True
    counts = _mapping(content, "n-samples")
    sizes = [_mapping(counts, one).get("effective") for one in within]
    n = sum(size for size in sizes if isinstance(size, int)) or None
    return Measure(
        task=task,
        metric=plain_key(key),
        value=value,
        file=file,
        low=None if error is None else value - NORMAL * error,
        high=None if error is None else value + NORMAL * error,
        n=len(samples.ids) if samples is not None else n,
        samples=samples,
        chance=_chance(content, metric, within, parts),
        is_share=rises and 0.0 <= value <= 1.0 and "perplexity" not in metric,
        rises=rises,
        conditions=_conditions(content, within),
        settings=_settings(content),
    )


def _pooled(
    key: str, parts: Mapping[str, Documents], within: list[str], value: float
) -> Samples | None:
    """The samples of a task, or those of all subtasks of a group, if the score is their mean or that of the subtasks' means."""
    if set(parts) != set(within):
        return None
    if len(within) == 1:
        samples = parts[within[0]].of(key)
        return samples if samples is not None and _is_mean(samples, value) else None
    scores, digests, classes = {}, {}, {}
    for task, documents in parts.items():
        if not (own := documents.scores.get(key)):
            return None
        scores |= {f"{task}/{one}": score for one, score in own.items()}
        digests |= {f"{task}/{one}": documents.digests.get(one, "") for one in own}
        classes |= {f"{task}/{one}": task for one in own}
    for by_class in (None, classes):
        samples = samples_of(scores, plain_key(key), digests, by_class)
        if _is_mean(samples, value):
            return samples
    return None


def _is_mean(samples: Samples, value: float) -> bool:
    outcome = samples.outcome
    mean = float(np.mean(outcome.values))
    if outcome.groups is not None:
        of = [outcome.values[outcome.groups == group].mean() for group in np.unique(outcome.groups)]
        mean = float(np.mean(of))
    return bool(np.isclose(mean, value, rtol=1e-4, atol=1e-6))


def _chance(
    content: Mapping[str, Any], metric: str, within: list[str], parts: Mapping[str, Documents]
) -> float | None:
    """What guessing gives: 1 over the number of answers where one is chosen, 0 where they are written; else unknown."""
    levels, sizes = [], []
    for task in within:
        config = _mapping(_mapping(content, "configs"), task)
        kind, level = config.get("output_type"), None
        if kind in ("generate_until", "loglikelihood"):
            level = 0.0
        elif kind == "multiple_choice" and metric in _CHOSEN:
            choices = config.get("doc_to_choice")
            level = parts[task].chance if task in parts else None
            if level is None and isinstance(choices, list) and choices:
                level = 1.0 / len(choices)
        if level is None:
            return None
        levels.append(level)
        sizes.append(len(parts[task].digests) or 1 if task in parts else 1)
    return float(np.average(levels, weights=sizes))


def _conditions(content: Mapping[str, Any], within: list[str]) -> dict[str, str]:
    told = {}
    for name, key in (("number of shots", "n-shot"), ("version of the task", "versions")):
        by_task = _mapping(content, key)
        values = [str(by_task[one]) for one in within if one in by_task]
        if values:
            told[name] = ", ".join(dict.fromkeys(values))
    return told


def _settings(content: Mapping[str, Any]) -> dict[str, str]:
    names = {"chat template": "chat_template_sha", "system prompt": "system_instruction_sha"}
    told = {name: str(content[key] or "none") for name, key in names.items() if key in content}
    version = content.get("lm_eval_version")
    return told | ({"version of lm-eval": str(version)} if version else {})


def _groups(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """Group -> the tasks at its ends, of groups that have a score of their own."""
    children = {
        name: [str(one) for one in of]
        for name, of in _mapping(content, "group_subtasks").items()
        if isinstance(of, list) and of
    }

    return {
        name: _leaves(name, children)
        for name in children
        if any(
            "," in key and number_of(v) is not None
            for key, v in content["results"].get(name, {}).items()
        )
    }


def _leaves(group: str, children: Mapping[str, list[str]]) -> list[str]:
    """The tasks at a group's ends, each once; the group itself where it names nothing but groups within each other."""
    leaves, seen, left = [], set(), [group]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in children:
            left += reversed(children[name])
        else:
            leaves.append(name)
    return leaves or [group]


def _without_subtasks(measures: list[Measure], groups: Mapping[str, list[str]]) -> list[Measure]:
    """Of a group with a score the whole group alone, of groups within groups the outermost."""
    inside = {task for name, of in groups.items() for task in of if task != name}
    inside |= {
        small for small in groups for large in groups
        if small != large and set(groups[small]) < set(groups[large])
    }  # fmt: skip
    return [measure for measure in measures if measure.task not in inside]


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def measures_of_samples(task: str, documents: Documents) -> list[Measure]:
    """The measures of a file of samples that stands alone: the means, as far as metrics are means."""
    measures = []
    for key in documents.scores:
        samples = documents.of(key)
        assert samples is not None
        values = samples.outcome.values
        metric = key.partition(",")[0]
        chance = documents.chance if metric in _CHOSEN else None
        measures.append(
            Measure(
                task, plain_key(key), float(values.mean()), documents.file, n=len(values), samples=samples,
                chance=chance, is_share=bool((values >= 0).all() and (values <= 1).all()),
            )
        )  # fmt: skip
    return measures


def merged(name: str, tool: str, runs: Iterable[list[Measure]]) -> Measured:
    """One model from several runs, the oldest first: of a task measured twice the last counts."""
    by_task: dict[str, list[Measure]] = {}
    for measures in runs:
        found: dict[str, list[Measure]] = {}
        for measure in measures:
            found.setdefault(measure.task, []).append(measure)
        by_task |= found
    return Measured(name, (tool,), tuple(one for of in by_task.values() for one in of))
