"""What was measured, on the model card of an export: a table for readers, and the two formats that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult

from corda_vlm.adapter.exchange.card import write_export_card
from corda_vlm.adapter.folder import REPORT
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation.scores import BASE, value_text
from corda_vlm.files import read_json, shown, write_text
from corda_vlm.report.analysis.kept import kept_share

EVAL_RESULTS = Path(".eval_results") / "corda_vlm.yaml"
"""Where the hub looks for scores on benchmarks that it has."""


def write_card(
    folder: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    method: str | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    scale: float | None = None,
    datasets: Mapping[str, str] | None = None,
) -> None:
    """Write the scores of one trained model into the README.md of its export, before and after, with the share that was kept.

    Args:
        folder: an export of ours.
        rows: of scores.jsonl (`corda_vlm.evaluation.score_file.read_rows`), those of the base model among them.
        method, learning_rate, seed, scale: which trained model it is; None where the rows have one alone.
        datasets: task -> the id of its data set on the hub, "owner/name": those scores are also written to `.eval_results/`, which
            the hub shows on the page of the model and on the leaderboard of the data set.

    Raises:
        CordaError: no export there, no such scores, or those of several models; lists them.
        UnknownNameError: a data set for a task that was not measured.
    """
    report = read_json(Path(folder) / REPORT, "export's report")
    if not isinstance(report, dict) or "name" not in report or "load" not in report:
        raise CordaError(f"{shown(folder)} is no export with a card; export the adapter again")
    wanted = {"method": method, "learning_rate": learning_rate, "seed": seed, "scale": scale}
    trained = rows_of_one_model(rows, wanted)
    tasks = {row["task"] for row in trained}
    for task in datasets or ():
        if task not in tasks:
            raise UnknownNameError("task", task, tasks)
    base = {(row["task"], row["metric"]): row for row in rows if row["method"] == BASE}
    results = [_eval_result(row, report) for row in trained]
    head = {"model_name": report["name"], "eval_results": results}
    write_export_card(folder, report, sections=_table(trained, base), head=head)
    if datasets:
        _write_entries(Path(folder), trained, datasets)


def rows_of_one_model(
    rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """The rows of the trained model that is meant, the last of those measured twice.

    Args:
        rows: of scores.jsonl, those of the base model among them.
        wanted: method, learning_rate, seed and scale; None where any will do.

    Raises:
        CordaError: no such scores, or those of several models; lists them.
    """
    fitting = [
        row
        for row in rows
        if row["method"] != BASE
        and all(value is None or row.get(name) == value for name, value in wanted.items())
    ]
    models = list(dict.fromkeys(tuple(row.get(name) for name in wanted) for row in fitting))
    if len(models) != 1:
        every = dict.fromkeys(tuple(r.get(n) for n in wanted) for r in rows if r["method"] != BASE)
        listed = "; ".join(
            ", ".join(f"{n}={v!r}" for n, v in zip(wanted, model, strict=True))
            for model in (models or every)
        )
        which = "there are scores of several" if models else "there are no scores of it"
        raise CordaError(
            f"which trained model it is has to be told, as {which}: {listed or 'none'}"
        )
    return list({(row["task"], row["metric"]): row for row in fitting}.values())


def _table(
    trained: Sequence[Mapping[str, Any]], base: Mapping[tuple[str, str], Mapping[str, Any]]
) -> str:
    lines = [
        "## What was measured",
        "",
        "| task | role | metric | before | after | 95 % interval | kept |",
        "|---|---|---|---:|---:|---|---:|",
    ]
    for row in trained:
        metric, before = row["metric"], base.get((row["task"], row["metric"]))
        text = [value_text(metric, float(row[name])) for name in ("value", "low", "high")]
        was = "–" if before is None else value_text(metric, float(before["value"]))
        kept = _kept(row, before)
        lines.append(
            f"| {row['task']} | {row['role']} | {metric} | {was} | {text[0]} | {text[1]} to {text[2]} | "
            f"{'–' if kept is None else f'{kept:.1%}'} |"
        )
    note = (
        "Kept is (after − chance) / (before − chance), of the knowledge from before the training."
    )
    return "\n".join([*lines, "", note, ""])


def _kept(row: Mapping[str, Any], before: Mapping[str, Any] | None) -> float | None:
    """The share of what the base model has above chance; None where that is nothing, or the task was to be learned."""
    if row["role"] != "retention" or before is None:
        return None
    chance, low = float(row.get("chance") or 0.0), before.get("low")
    return kept_share(row["metric"], float(row["value"]), float(before["value"]), low, chance)


def _eval_result(row: Mapping[str, Any], report: Mapping[str, Any]) -> EvalResult:
    """A score in the head of the card, `model-index`."""
    return EvalResult(
        task_type=report.get("pipeline_tag") or "other",
        dataset_type=row["task"],
        dataset_name=f"{row['task']} ({row['role']})",
        metric_type=row["metric"],
        metric_value=round(float(row["value"]), 6),
    )


def _write_entries(
    folder: Path, trained: Sequence[Mapping[str, Any]], datasets: Mapping[str, str]
) -> None:
    """The file of `EvalResultEntry`s, which only huggingface_hub 1 has a class for."""
    first = {row["task"]: row for row in reversed(trained)}  # a task's first metric is its own
    entries = [
        {
            "dataset": {"id": dataset, "task_id": task},
            "value": round(float(first[task]["value"]), 6),
            "notes": f"{first[task]['metric']}, {first[task]['role']}, n={first[task]['n']}",
        }
        for task, dataset in datasets.items()
    ]
    (folder / EVAL_RESULTS).parent.mkdir(exist_ok=True)
    write_text(folder / EVAL_RESULTS, yaml.safe_dump(entries, sort_keys=False))
