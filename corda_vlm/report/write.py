"""The report of a run: what each method gained and what it kept, as a table, a page and pictures.

Everything is computed from scores.jsonl, so a report can be written at any time, of a run in progress too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corda_vlm.errors import ForeignFileError
from corda_vlm.files import read_json, write_text
from corda_vlm.report.analysis.compare import compare
from corda_vlm.report.analysis.findings import findings, state
from corda_vlm.report.analysis.learned import reference_learned
from corda_vlm.report.analysis.results import Results
from corda_vlm.report.document import Picture, markdown, page
from corda_vlm.report.markup import terminal
from corda_vlm.report.tables import base_table, equal_table, trained_table
from corda_vlm.report.words import FEW
from corda_vlm.run_files import DESCRIPTION, PAGE, REPORT, SCORES
from corda_vlm.text_table import text_table


def write_report(
    run_dir: str | Path,
    *,
    pictures: Sequence[Picture] = (),
    predictions: Sequence[str | Path] = (),
) -> Path:
    """Write report.md, report.html and the pictures (tradeoff.png, training.png, forecast.png, …) into a run's folder.

    Args:
        run_dir: holds scores.jsonl, and if there is one run.json with `title`, `command`, `machine` and
            whatever else should be told.
        pictures: more pictures for the report.
        predictions: files of what models said of each example, beside the run's own predictions.jsonl where it has one;
            those that a model gained and lost against the base model are shown.

    Returns:
        the path of report.html.

    Raises:
        ForeignFileError: no scores, or a file that is not one of ours.
        DataError: trained models without the base model's scores.
        CordaError: matplotlib is not installed.
    """
    run_dir = Path(run_dir)
    results, facts = _results(run_dir), _facts(run_dir)
    from corda_vlm.report.sections import Sections  # which draws, so that it needs matplotlib

    report = Sections(results, run_dir, pictures, predictions).report(facts)
    write_text(run_dir / REPORT, markdown(report, run_dir))
    write_text(run_dir / PAGE, page(report))
    return run_dir / PAGE


def summary_table(run_dir: str | Path) -> str:
    """The table a person wants to see at the end of a run, for a terminal."""
    results = _results(Path(run_dir))
    comparisons = compare(results) if reference_learned(results) else []
    tables = [trained_table(results, brief=True)] if results.trained or results.diverged else []
    if comparisons:
        # of many methods the long table is in the report
        tables = [*(tables if len(results.trained) <= FEW else ()), equal_table(comparisons)]
    if not tables:
        tables = [base_table(results)]
    lines = [
        text_table(
            [[terminal(cell) for cell in row] for row in table.rows],
            [terminal(cell) for cell in table.headings],
            [place > 0 for place in range(len(table.headings))],
        )
        for table in tables
    ]
    return "\n\n".join([*lines, *map(terminal, findings(results) or [state(results)])])


def _results(run_dir: Path) -> Results:
    results = Results.read(run_dir)
    if not results.primary:
        raise ForeignFileError(
            f"{run_dir / SCORES} holds no score yet; evaluate a model into it first"
        )
    return results


def _facts(run_dir: Path) -> dict[str, Any]:
    path = run_dir / DESCRIPTION
    facts = read_json(path, "run description") if path.exists() else {}
    if not isinstance(facts, dict):
        raise ForeignFileError(f"{path} must hold a mapping with title, command, machine, …")
    return {"title": run_dir.resolve().name, **facts}
