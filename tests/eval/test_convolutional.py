"""The benchmark of convolutional towers, on one in miniature."""

from __future__ import annotations

import json

import pytest

from corda_vlm.files import asset


@pytest.mark.slow
def test_what_it_measures(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(asset("eval/benchmarks")))
    import convolutional

    config = {
        "embed_dim": 24,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32},
        "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
    }
    path = tmp_path / "tiny-resnet-of-a-test.json"
    path.write_text(json.dumps(config))
    row = convolutional.measure(str(path), images=8, batch=4, rank=2, steps=1)
    assert row["sites"] == 20
    assert all(row[stage] >= 0 for stage in convolutional.KEYS)
    assert row["step corda-kpm"] > 0
    assert "tiny-resnet-of-a-test" in convolutional.summary([row, row])
