"""Which sections a report has: each only where there is something to say. All numbers are invented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corda_vlm.report.analysis.results import Results
from corda_vlm.report.sections import Sections

BASE = "The model before training"


def headings(invented: Any, folder: Path, rows: Any, **facts: Any) -> dict[str, bool]:
    """Heading -> whether it is folded, of a run with these scores."""
    run = invented.write_run(folder, rows)
    report = Sections(Results.read(run), run, ()).report({"title": "Invented", **facts})
    assert report.title == "Invented"
    return {section.heading: section.folded for section in report.sections}


def test_a_small_run(invented: Any, tmp_path: Path) -> None:
    found = headings(invented, tmp_path / "run", invented.study(invented.DEMO))
    assert next(iter(found)) == "What was kept at equal task accuracy", "what matters first"
    assert list(found)[-1] == BASE, "nothing is known of how it was run"
    assert not found["Every method at every learning rate"], "few methods are read at once"


def test_of_many_methods_the_long_tables_are_folded(invented: Any, tmp_path: Path) -> None:
    found = headings(invented, tmp_path / "run", invented.large_study())
    assert found["Every method at every learning rate"]
    assert "Against lora scaled after training" in found
    assert "Scaled after training" in found
    assert found["Scaled after training"]


def test_without_the_reference_nothing_is_compared(invented: Any, tmp_path: Path) -> None:
    rows = [row for row in invented.study(invented.DEMO) if row["method"] != "lora"]
    found = headings(invented, tmp_path / "run", rows)
    assert "What was learnt and what was kept" in found
    assert "What was kept at equal task accuracy" not in found


def test_the_base_model_alone_and_how_it_was_run(invented: Any, tmp_path: Path) -> None:
    rows = [row for row in invented.study(invented.DEMO) if row["method"] == "base"]
    found = headings(invented, tmp_path / "run", rows, command="corda-vlm run x.yaml", seeds=[0, 1])
    assert list(found) == [BASE, "How it was run"]
