"""Scores of our own as results to compare. All numbers are invented."""

from __future__ import annotations

import pytest

from corda_vlm.errors import CordaError
from corda_vlm.jsonl import append_jsonl
from corda_vlm.report.before_after.comparison import compare_models
from corda_vlm.report.before_after.options import Roles
from corda_vlm.report.formats.registry import read_results
from tests.report.invented import rows_of


def test_scores_on_other_numbers_of_examples_are_not_compared(tmp_path):
    models = []
    for name, value, n in (("base", 0.44, 60), ("same", 0.3, 60), ("other", 0.3, 5000)):
        rows = [{**row, "n": n} for row in rows_of(name, {"old": value})]
        append_jsonl(tmp_path / f"{name}.jsonl", rows, "score")
        models += read_results(tmp_path / f"{name}.jsonl")
    before, same, other = models
    assert len(compare_models(before, [same], Roles())) == 1
    with pytest.raises(CordaError, match="the number of examples is 60 before and 5000 after"):
        compare_models(before, [other], Roles())
