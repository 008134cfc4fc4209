"""The measurement of the two base modes, on the smallest real model."""

from __future__ import annotations

import pytest

from corda_vlm.files import asset


@pytest.mark.parametrize("base", ["untouched", "residual"])
def test_measures_what_it_says(base, monkeypatch):
    monkeypatch.syspath_prepend(str(asset("eval/benchmarks")))
    import base_modes

    found = base_modes.measure(base, "emoji-clip", "pissa", rank=4, batch=2, steps=1)
    assert found["step_seconds"] > 0
    errors = [found[key] for key in ("start", "start_max", "weights", "restored")]
    if base == "untouched":
        assert errors == [0, 0, 0, 0]
    else:
        assert all(0 < error < 0.05 for error in errors)
