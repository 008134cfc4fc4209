"""The measurement of blockwise calibration, on a tiny model; and the sizes that are computed."""

from __future__ import annotations

import pytest
from transformers import LlamaForCausalLM

from corda_vlm.files import asset


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(asset("eval/benchmarks")))
    import blockwise_memory

    return blockwise_memory


@pytest.mark.filterwarnings("ignore:.*have no full rank")
def test_measures_what_it_says(benchmark, tiny_llm, tiny_tokenizer, tmp_path):
    assert isinstance(tiny_llm.model, LlamaForCausalLM)
    tiny_llm.model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    rows = [
        benchmark.measure(way, str(tmp_path), "float32", samples=4, length=8, batch=2, seed=0)
        for way in benchmark.WAYS
    ]
    assert "sha256" not in rows[0]
    assert rows[1]["sha256"] == rows[2]["sha256"]
    assert [row["way"] for row in benchmark.summary(rows + rows)] == list(benchmark.WAYS)
    assert all(row["calibrate_mb"] >= 0 and row["plan_cpu_seconds"] >= 0 for row in rows)


def test_sizes_of_llava(benchmark):
    shape = benchmark.LLAMA["LLaVA-1.5 7B"]
    found = benchmark.sizes(benchmark.llava(shape), shape["hidden_size"])

    def triangles(*widths):
        return sum(width * (width + 1) // 2 * 4 for width in widths)

    block = triangles(4096, 4096, 4096, 11008)
    before = 24 * triangles(1024, 1024, 1024, 4096) + triangles(1024, 4096)
    assert block < found["a block"] < 1.08 * block, "stored in panels that overlap the diagonal"
    assert before < found["before the blocks"] < 1.2 * before
    assert found["all"] == found["before the blocks"] + 32 * found["a block"]
    assert found["hidden states"] == 256 * 676 * 4096 * 2
