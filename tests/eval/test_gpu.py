"""The script for accelerators, at its smallest on the CPU."""

from __future__ import annotations

import json
import sys

import pytest

from corda_vlm.files import asset


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(asset("eval/benchmarks")))
    import gpu

    return gpu


def test_all_parts_run_and_are_right(gpu, monkeypatch, tmp_path, capsys):
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--device", "cpu", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    told = json.loads(out.read_text())
    assert told["wrong"] == []
    assert told["correctness"]["start, untouched, bfloat16"] == 0
    assert set(told["training"]) == set(gpu.KINDS)
    assert told["training"]["peft lora"]["ratio"] == 1
    assert told["calibration"]["tokens"] == gpu.SMALL.tokens
    assert "all within their limits" in printed


def test_without_an_accelerator_it_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "--small" in capsys.readouterr().err


def test_what_is_off_is_named(gpu, monkeypatch):
    monkeypatch.setitem(gpu.LIMITS, "covariances", -1.0)
    results = gpu.run(gpu.Device("cpu"), gpu.SMALL, gpu.torch.float32)
    assert results["wrong"] == ["covariances"]
