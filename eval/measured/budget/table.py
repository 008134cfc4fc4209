"""The table of report.md from the folder of a run: what each budget kept, on its probe and on the test splits.

python eval/measured/budget/table.py runs/budget
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from corda_vlm.evaluation.score_file import read_rows
from corda_vlm.evaluation.scores import BASE

HEAD = (
    "| task | variant | seed | budget | strength | last weight | kept, probe | kept, test | task accuracy |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|"
)


def first_metrics(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Task -> its first row, the metric by which it is compared."""
    return {row["task"]: row for row in reversed(rows)}


def line(folder: Path, rows: list[dict[str, Any]], base: dict[str, dict[str, Any]]) -> str:
    first = first_metrics(rows)
    kept = [
        (row["value"] - row["chance"]) / (base[task]["value"] - row["chance"])
        for task, row in first.items()
        if row["role"] == "retention"
    ]
    gain = next(row["value"] for row in first.values() if row["role"] == "gain")
    row = rows[0]
    training = folder / row["method"] / f"{row['learning_rate']:g}-{row['seed']}"
    spent = json.loads((training / "result.json").read_text()).get("budget")
    told = ["–"] * 4
    if spent is not None:
        weight = "–" if spent["weight"] is None else f"{spent['weight']:.2g}"
        told = [
            f"{spent['keep']:.0%}",
            f"{spent['strength']:.2f}",
            weight,
            f"{spent['kept']['share']:.1%}",
        ]
    cells = [
        folder.name,
        row["method"],
        str(row["seed"]),
        *told,
        f"{sum(kept) / len(kept):.1%}",
        f"{gain:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def table(run: Path) -> str:
    lines = [HEAD]
    for scores in sorted(run.glob("*/scores.jsonl")):
        trainings: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
        for row in read_rows(scores):
            trainings[row["method"], row.get("learning_rate"), row.get("seed")].append(row)
        base = first_metrics(trainings.pop((BASE, None, None)))
        lines += [line(scores.parent, rows, base) for rows in trainings.values()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
