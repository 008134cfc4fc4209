"""The benchmark of a training step on a tiny CLIP: all kinds train, and what they are compared by is there."""

from __future__ import annotations

import pytest
import torch

from corda_vlm.files import asset


@pytest.mark.parametrize("autocast", [False, True])
def test_every_kind_takes_its_turn(autocast, monkeypatch):
    monkeypatch.syspath_prepend(str(asset("eval/benchmarks")))
    import step_vs_peft

    torch.manual_seed(0)
    found = step_vs_peft.measure(step_vs_peft.small_clip(), 2, 3, 4, autocast)
    assert list(found) == list(step_vs_peft.KINDS)
    assert len({one["parameters"] for one in found.values()}) == 1
    assert found["peft lora"]["ratio"] == 1
    for one in found.values():
        assert one["seconds"] > 0
        assert one["quartiles"][0] <= one["ratio"] <= one["quartiles"][1]
