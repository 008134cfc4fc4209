"""The line that says what the tests took beside what they may take."""

from __future__ import annotations

import pytest

from tests import budget


@pytest.mark.parametrize(("seconds", "amx", "over"), [(601, True, True), (601, False, False)])
def test_more_than_the_budget_is_said(seconds, amx, over):
    line = budget.spent(seconds, amx)
    assert line.startswith("10.0 minutes; ")
    assert ("over" in line) == over
    assert f"is {10 if amx else 15}" in line


def test_a_processor_held_to_avx2_has_no_amx(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert not budget.has_amx()
