"""The benchmark of a 7B model's block, on tiny blocks of the same classes."""

from __future__ import annotations

import pytest
import torch

from corda_vlm.files import asset

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(asset("eval/benchmarks")))
    import scale_7b

    return scale_7b


@pytest.mark.parametrize("name", ["llama-7b", "clip-l"])
def test_a_block_is_measured(bench, name):
    found = bench.measure(name, bench.SMALL[name], torch.float32, peft=False)
    assert {"forward", "calibrate", "plan"} <= set(found["stages"])
    assert found["blocks"] == bench.BLOCKS[name].blocks
    rates = {"float32": 1.0, "float64": 1.0}
    table = bench.report({"gflops": rates, "blocks": {name: [found]}})
    assert table.count(name) == 3  # two stages, and the whole model


def test_operations_are_counted_by_hand(bench):
    block = bench.SMALL["llama-7b"]
    found = bench.measure("llama-7b", block, torch.float32, peft=False)["flops"]
    tokens, d, m = block.batches * block.batch_size * block.length, block.width, block.inner
    assert found["calibrate"]["float32"] == tokens * (
        3 * d**2 + m**2
    )  # three streams of d, one of m
    oriented = 4 * 2 * d**3 + 2 * 2 * d * d**2 + 2 * d * m**2
    assert found["plan"]["float32"] == oriented
    factors = 3 * d**3 / 3 + m**3 / 3 + 4 * 2 * d**3 / 3 + 3 * (m * d**2 + d**3 / 3)
    assert found["plan"]["float64"] == pytest.approx(factors)
