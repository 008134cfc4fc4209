"""The overview of a study: a part for each experiment, also before it has run; and what is no list of experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corda_vlm.errors import ForeignFileError
from corda_vlm.report import write_report
from corda_vlm.report.overview import write_overview
from corda_vlm.run_files import STUDY


def listed(folder: Path, content: Any) -> None:
    (folder / STUDY).write_text(json.dumps(content))


def test_what_has_run_has_its_finding_its_picture_and_its_report(
    invented: Any, tmp_path: Path
) -> None:
    write_report(invented.write_run(tmp_path / "one", invented.study(invented.DEMO)))
    listed(tmp_path, {"title": "Study", "experiments": {"one": "The first", "two": "The second"}})
    text = write_overview(tmp_path).read_text()
    assert text.startswith("# Study\n\n## The first\n\nAt the task accuracy")
    assert "**corda-kpm** keeps 43.0%" in text
    assert "models measured. [Report](one/report.md)." in text
    assert "](one/tradeoff.png)" in text
    assert text.rstrip().endswith("## The second\n\nNot run yet.")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (["a"], "a study cannot be .*; it must be a mapping; run the study again"),
        ({"experiments": {}}, "title cannot be None; it must be text"),
        ({"title": "S"}, "experiments cannot be None; it must be a mapping"),
        ({"title": "S", "experiments": ["a"]}, "experiments cannot be .*; it must be a mapping"),
        ({"title": "S", "experiments": {"a": 3}}, "experiments.a cannot be 3; it must be text"),
        ({"title": "S", "experiments": {"../a": "A"}}, "'../a' is no name of an experiment"),
        ({"title": "S", "experiments": {"": "A"}}, "'' is no name of an experiment"),
    ],
)
def test_what_is_no_list_of_experiments(tmp_path: Path, content: Any, why: str) -> None:
    listed(tmp_path, content)
    with pytest.raises(ForeignFileError, match=f"study.json: .*{why}"):
        write_overview(tmp_path)
    assert not (tmp_path / "report.md").exists()
