"""The report of a run: what each method gained and what it kept, as a table, a page and a picture.

Everything is computed from scores.jsonl, so a report can be written at any time, of a run in progress too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from corda_vlm.errors import ForeignFileError
from corda_vlm.evaluation.frontier import (
    BASE,
    REFERENCE,
    Comparison,
    Results,
    Setting,
    compare,
)
from corda_vlm.evaluation.pictures import tradeoff, training_curves
from corda_vlm.evaluation.render import Picture, Report, Section, Table, markdown, page
from corda_vlm.evaluation.scores import Interval, read_rows
from corda_vlm.files import read_json, write_text

ABSENT = "–"


def write_report(run_dir: str | Path, *, pictures: Sequence[Picture] = ()) -> Path:
    """Write report.md, report.html and tradeoff.png (and training.png) into a run's folder.

    Args:
        run_dir: holds scores.jsonl, and if there is one run.json with `title`, `command`, `machine` and
            whatever else should be told.
        pictures: more pictures for the report, e.g. of the plan.

    Returns:
        the path of report.html.

    Raises:
        ForeignFileError: no scores, or a file that is not one of ours.
        DataError: trained models without the base model's scores.
    """
    run_dir = Path(run_dir)
    results = Results.of(_rows(run_dir))
    facts = _facts(run_dir)
    comparisons = compare(results)
    drawn = []
    if tradeoff(results, run_dir / "tradeoff.png"):
        drawn.append(
            Picture(
                run_dir / "tradeoff.png",
                "Accuracy on the new task, left to right, against knowledge kept, bottom to top, "
                f"for {_listed(list(results.trained))}. "
                + " ".join(_findings(comparisons)).replace("**", ""),
                "Up and to the right is better. Compare the curves at one task accuracy, never single points.",
            )
        )
    trained = []
    if training_curves(run_dir, run_dir / "training.png"):
        trained.append(
            Picture(
                run_dir / "training.png",
                f"Training loss over steps, a panel for each of {_listed(list(results.trained))}.",
                "Training loss, a running mean over a twentieth of the run; one line a seed.",
            )
        )
    report = _report(results, comparisons, facts, drawn, [*trained, *pictures])
    write_text(run_dir / "report.md", markdown(report, run_dir))
    write_text(run_dir / "report.html", page(report))
    return run_dir / "report.html"


def summary_table(run_dir: str | Path) -> str:
    """The table a person wants to see at the end of a run, for a terminal."""
    results = Results.of(_rows(Path(run_dir)))
    tables = [_trained_table(results, brief=True)] if results.trained else []
    comparisons = compare(results)
    if comparisons:
        tables.append(_equal_table(comparisons))
    if not tables:
        tables = [_base_table(results)]
    told = []
    for table in tables:
        align = ["left"] + ["right"] * (len(table.headings) - 1)
        told.append(
            tabulate(table.rows, headers=table.headings, colalign=align, disable_numparse=True)
        )
    return "\n\n".join([*told, *(f.replace("**", "") for f in _findings(comparisons))])


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_rows(run_dir / "scores.jsonl")
    if not rows:
        raise ForeignFileError(
            f"{run_dir / 'scores.jsonl'} holds no score yet; evaluate a model into it first"
        )
    return rows


def _facts(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "run.json"
    facts = read_json(path, "run description") if path.exists() else {}
    if not isinstance(facts, dict):
        raise ForeignFileError(f"{path} must hold a mapping with title, command, machine, …")
    return {"title": run_dir.resolve().name, **facts}


# ------------------------------------------------------------------ the content


def _report(
    results: Results,
    comparisons: Sequence[Comparison],
    facts: dict[str, Any],
    drawn: Sequence[Picture],
    more: Sequence[Picture],
) -> Report:
    lead = _findings(comparisons) or [_state(results)]
    sections = []
    if drawn or comparisons:
        sections.append(
            Section(
                "What was kept at equal task accuracy",
                [_how_compared(results, comparisons)] if comparisons else [_state(results)],
                drawn,
                [_equal_table(comparisons)] if comparisons else [],
            )
        )
    if results.trained:
        sections.append(
            Section("Every method at every learning rate", tables=[_trained_table(results)])
        )
        if len(results.known) > 1 and comparisons:
            alone = [replace(results, retention=(task,)) for task in results.known]
            tables = [
                replace(
                    _equal_table(compare(one)), caption=f"The same on {one.retention[0]} alone."
                )
                for one in alone
            ]
            sections.append(Section("Each retention task by itself", tables=tables, folded=True))
        if _scaled(results):
            sections.append(
                Section(
                    "Scaled after training",
                    tables=[_trained_table(results, scaled=True)],
                    folded=True,
                )
            )
    sections.append(Section("The model before training", tables=[_base_table(results)]))
    if more:
        sections.append(Section("How it was trained", pictures=more))
    listed = {key: value for key, value in facts.items() if key != "title"}
    if listed:
        rows = [[key.replace("_", " "), _fact(value)] for key, value in listed.items()]
        sections.append(Section("How it was run", tables=[Table("", ["", ""], rows)]))
    return Report(str(facts["title"]), lead, sections)


def _state(results: Results) -> str:
    if not results.trained:
        return "Only the model before training has been measured so far."
    if not results.gain or not results.retention:
        return "A trade-off needs at least one task of each role, gain and retention."
    if not results.known:
        return (
            f"The base model does no better than chance on {_listed(results.retention)}, so there is no knowledge "
            "to keep and nothing to compare."
        )
    return f"Nothing was trained with `{REFERENCE}`, so there is no task accuracy to compare the methods at."


def _how_compared(results: Results, comparisons: Sequence[Comparison]) -> str:
    best = results.best_setting(REFERENCE)
    assert best is not None
    judged = (
        "the validation split"
        if results.selection
        else "the task itself, which flatters it slightly"
    )
    seeds = len(results.seeds)
    aim = next(c.task for c in comparisons if c.share == 1.0)
    return (
        f"`{REFERENCE}` learns the task best at {_setting(best)}, judged on {judged}: {_percent(aim)}. Kept is "
        "(score − chance) / (base − chance), averaged over the retention tasks. Between learning rates the curve "
        "is taken as straight. Means over "
        + (
            f"{seeds} seeds; brackets: 95% bootstrap interval over seeds"
            if seeds > 1
            else "one seed"
        )
        + (", which says little with so few." if 1 < seeds < 5 else ".")
    )


def _findings(comparisons: Sequence[Comparison]) -> list[str]:
    """One sentence on the best method that is not the reference."""
    at = [c for c in comparisons if c.share == 1.0]
    reference = next((c for c in at if c.curve == REFERENCE), None)
    others = [c for c in at if not c.curve.startswith(REFERENCE) and c.kept is not None]
    if reference is None or reference.kept is None or not others:
        return []
    best = max(others, key=lambda c: c.kept.value if c.kept else 0.0)
    assert best.kept is not None
    told = (
        f"At the task accuracy that {REFERENCE} reaches at its best ({_percent(best.task)}), **{best.curve}** keeps "
        f"{_percent(best.kept.value)} of what the model knew and {REFERENCE} keeps {_percent(reference.kept.value)}"
    )
    return [told + (f", {best.ratio.value:.2f} times as much." if best.ratio else ".")]


def _equal_table(comparisons: Sequence[Comparison]) -> Table:
    shares = list(dict.fromkeys(c.share for c in comparisons))
    by = {(c.curve, c.share): c for c in comparisons}
    headings = ["method"]
    for share in shares:
        task = next(c.task for c in comparisons if c.share == share)
        if share is None:
            headings.append("area under the curve")
        else:
            headings += [f"kept at task {_percent(task)}", f"× {REFERENCE}"]
    rows = []
    for curve in dict.fromkeys(c.curve for c in comparisons):
        row = [curve]
        for share in shares:
            found = by[(curve, share)]
            row.append(_interval(found.kept, _percent) if found.kept else "not reached")
            if share is not None:
                row.append(_interval(found.ratio, lambda v: f"{v:.2f}"))
        rows.append(row)
    best = next(c.task for c in comparisons if c.share == 1.0)
    return Table(
        f"Kept knowledge where a method has learnt as much as {REFERENCE} at its best ({_percent(best)}), and at "
        "0.95 of that. Area: the mean of what is kept from five points above the base model's task accuracy to "
        "there; left of its slowest learning rate a method counts as keeping what it keeps with that.",
        headings, rows,
    )  # fmt: skip


def _scaled(results: Results) -> bool:
    return any(setting.scale != 1.0 for of in results.trained.values() for setting in of)


def _trained_table(results: Results, brief: bool = False, scaled: bool = False) -> Table:
    tasks = list(results.gain) + list(results.retention)
    headings = ["method", "learning rate"] + (["scale"] if scaled else [])
    for task in tasks:
        role = "gain" if task in results.gain else "kept"
        headings.append(f"{task} {results.primary[task]}" if not brief else f"{task} ({role})")
    headings.append("kept share")
    rows = []
    base = results.base_point
    cells = [_percent(results.base[task]) if task in results.base else ABSENT for task in tasks]
    rows.append(
        [BASE, ABSENT, *([ABSENT] if scaled else []), *cells, _percent(1.0) if base else ABSENT]
    )
    for method in results.trained:
        for setting in sorted(
            results.trained[method], key=lambda s: (s.learning_rate or 0.0, -s.scale)
        ):
            if (setting.scale != 1.0) != scaled:
                continue
            seeds = results.trained[method][setting]
            row = [
                method,
                ABSENT if setting.learning_rate is None else f"{setting.learning_rate:g}",
            ]
            row += [f"{setting.scale:g}"] if scaled else []
            for task in tasks:
                row.append(_spread([s[task] for s in seeds.values() if task in s], brief))
            placed = [p.kept for s in seeds.values() if (p := results.point(s))]
            rows.append([*row, _spread(placed, brief)])
    seeds = len(results.seeds)
    unknown = [task for task in results.retention if task not in results.known]
    left_out = (
        f" The base model does no better than chance on {_listed(unknown)}, so it does not count there."
        if unknown
        else ""
    )
    means = (
        f"Means over {seeds} seeds, in brackets the lowest and the highest. " if seeds > 1 else ""
    )
    return Table(
        f"{means}Gain: {_listed(results.gain)}. Retention: {_listed(results.retention)}. Kept share: 100% is "
        f"the base model, 0% is chance, the mean over the retention tasks.{left_out}",
        headings, rows,
    )  # fmt: skip


def _base_table(results: Results) -> Table:
    rows = []
    for row in results.base_rows:
        value, low, high = row["value"], row.get("low"), row.get("high")
        told = _percent(value)
        if low is not None and high is not None:
            told = _interval(Interval(value, low, high), _percent)
        n = row.get("n")
        chance = _percent(float(row.get("chance") or 0.0), digits=2)
        rows.append(
            [
                row["task"],
                row.get("role", ABSENT),
                row["metric"],
                told,
                chance,
                f"{n:,}" if n else ABSENT,
            ]
        )
    return Table(
        "With 95% bootstrap intervals over examples.",
        ["task", "role", "metric", "score", "chance", "examples"],
        rows,
    )


# ------------------------------------------------------------------ words and numbers


def _percent(value: float, unit: str = "%", digits: int = 1) -> str:
    return ABSENT if np.isnan(value) else f"{100 * value:.{digits}f}{unit}"


def _spread(values: Sequence[float], brief: bool) -> str:
    if not values:
        return ABSENT
    told = _percent(float(np.mean(values)))
    if brief or len(values) == 1:
        return told
    return f"{told} ({_percent(min(values), '')} to {_percent(max(values), '')})"


def _interval(interval: Interval | None, told: Any) -> str:
    if interval is None:
        return ABSENT
    low, high = (told(v).removesuffix("%") for v in (interval.low, interval.high))
    return f"{told(interval.value)} ({low} to {high})" if low != high else told(interval.value)


def _setting(setting: Setting) -> str:
    rate = (
        "its only setting"
        if setting.learning_rate is None
        else f"learning rate {setting.learning_rate:g}"
    )
    return rate if setting.scale == 1.0 else f"{rate}, scale {setting.scale:g}"


def _listed(names: Sequence[str]) -> str:
    names = list(names)
    if not names:
        return "none"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_fact(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_fact(inner) for inner in value)
    return str(value)
