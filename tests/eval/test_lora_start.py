"""The measurement of the `lora` export of a start, on few steps of the smallest real model."""

from __future__ import annotations

import pytest

from corda_vlm.files import asset


@pytest.mark.slow
def test_the_first_step_is_the_same_and_later_ones_are_not(monkeypatch):
    monkeypatch.syspath_prepend(str(asset("eval/benchmarks")))
    monkeypatch.chdir(asset("."))
    import lora_start

    monkeypatch.setattr(lora_start, "WAYS", ("residual", "lora export"))
    for spec in lora_start.SEEN.values():
        monkeypatch.setitem(spec, "limit", 8)
    rows = lora_start.measure(2, [1e-3], [0], (1, 3), samples=16, size=4, limit=4)
    same, export = rows
    assert set(same["apart"][3].values()) == {0.0}
    for what in ("new", "known"):
        assert 0 < export["apart"][1][what] < 0.05, "rounding, which Adam makes much of"
        assert export["apart"][3][what] < 0.5
    assert export["loss"][1] == pytest.approx(same["loss"][1], rel=1e-3)
    assert "lora export" in lora_start.summary(rows)
