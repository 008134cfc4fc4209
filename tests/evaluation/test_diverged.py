"""Trainings that diverged: listed beside the scores, and counted for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corda_vlm.errors import CordaError
from corda_vlm.evaluation.diverged import note_diverged, read_diverged
from corda_vlm.report.analysis.results import Results
from corda_vlm.report.tables import trained_table


def test_trainings_that_diverged_are_listed_and_count_for_nothing(
    invented: Any, tmp_path: Path
) -> None:
    run = invented.write_run(tmp_path / "run", invented.study(invented.DEMO))
    rows = invented.rows_of(
        "lora", {"new": 0.99}, rate=1.0, seed=0
    )  # measured on one task, then NaN
    rows += invented.rows_of("full", invented.at(0.95, 0.9), rate=1.0, seed=1)
    with (run / "scores.jsonl").open("a") as file:
        import json

        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert read_diverged(run) == {}
    note_diverged(run, method="lora", learning_rate=1.0, seed=0, reason="the loss is nan")
    note_diverged(run, method="full", learning_rate=1.0, seed=0, reason="the loss is nan")
    note_diverged(run, method="dora", learning_rate=2.0, seed=0, reason="the loss is nan")
    results = Results.read(run)
    assert results.best_setting("lora").learning_rate == 4e-3  # type: ignore[union-attr]
    assert results.best_setting("full").learning_rate == 1e-3, "one of its seeds diverged"  # type: ignore[union-attr]
    table = trained_table(results)
    told = {(row[0], row[1]): row for row in table.rows}
    assert told["lora", "1"][2:] == ["–", "–", "–", "diverged"]
    assert told["full", "1"][-1] == "diverged in 1 of 2 seeds"
    assert told["dora", "2"][-1] == "diverged"
    assert "became NaN or Inf, which is no score" in table.caption
    (run / "diverged.jsonl").write_text('{"method": 3}\n')
    with pytest.raises(CordaError, match="line 1, is not a diverged training: its method is 3"):
        Results.read(run)
