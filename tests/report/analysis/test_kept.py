"""The rule of what is kept. All numbers are invented."""

from __future__ import annotations

import pytest

from corda_vlm.report.analysis.kept import kept_share
from corda_vlm.report.analysis.results import Results


@pytest.mark.parametrize(
    ("metric", "value", "base", "low", "chance", "expected"),
    [
        ("top1", 0.7, 0.9, 0.88, 0.1, 0.75),
        ("top1", 0.7, 0.9, None, 0.1, 0.75),
        ("top1", 0.3, 0.11, 0.09, 0.1, None),
        ("top1", 0.3, 0.1, None, 0.1, None),
        ("perplexity", 20.0, 10.0, 9.0, 0.0, None),
        ("log_likelihood", -1.0, 1.0, 0.9, 0.0, None),
    ],
)
def test_what_is_kept(metric, value, base, low, chance, expected):
    share = kept_share(metric, value, base, low, chance)
    assert share == (None if expected is None else pytest.approx(expected))


def test_a_perplexity_counts_in_no_mean_of_kept_shares(invented):
    rows = [
        {**row, "metric": "perplexity"} if row["task"] == "old" else row
        for row in invented.study(invented.DEMO)
    ]
    assert Results.of(rows).known == ("older",)
