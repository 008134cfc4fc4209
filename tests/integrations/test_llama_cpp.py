"""llama.cpp itself: its converter on what is exported for it, and its own arithmetic with the base and the adapter."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from corda_vlm import export_adapter
from tests.integrations.served import learned
from tests.integrations.tools import Tool

pytestmark = [pytest.mark.unchecked, pytest.mark.slow]
LIVE = Path(__file__).with_name("llama_cpp_live.py")


def run(tool: Tool, command: str, folder: Path) -> None:
    """A command of an export, with the converter of the sources and in float32."""
    _, script, *words = shlex.split(command)
    (place,) = (tool.place / "sources").glob("*/vendor/llama.cpp")
    tool.run(place / script, *words, "--outtype", "f32", cwd=folder)


def test_a_converted_adapter_says_what_ours_says(tool, smollm2_4, tmp_path, measured):
    """the commands of an export convert base and adapter; llama.cpp's log-probabilities with it are ours"""
    model = learned(smollm2_4)
    folder = export_adapter(model, tmp_path / "lora", serve="llama.cpp", source=smollm2_4)
    base, adapter, serve = json.loads((folder / "corda_export.json").read_text())["serve_commands"]
    run(tool, base, tmp_path)
    run(tool, adapter, tmp_path)
    served = shlex.split(serve)
    gguf = tmp_path / served[served.index("-m") + 1], Path(served[served.index("--lora") + 1])
    ids = AutoTokenizer.from_pretrained(smollm2_4)("The capital of France is").input_ids
    with model.disable_adapter():
        before = likely(model, ids)
    apart = 0.0
    for want, lora in ((before, "none"), (likely(model, ids), str(gguf[1]))):
        tool.run(LIVE, gguf[0], lora, json.dumps(ids), tmp_path / "out.json", cwd=tmp_path)
        said = {int(k): v for k, v in json.loads((tmp_path / "out.json").read_text()).items()}
        assert len(said) == 5
        apart = max(apart, *(abs(value - want(token)) for token, value in said.items()))
        top = max(said, key=lambda token: said[token])
        assert top == int(want(None))
    assert likely(model, ids)(None) != before(None)
    assert apart < 0.01
    measured(f"log-probabilities of the five likeliest tokens within {apart:.0e}")


@torch.no_grad()
def likely(model: torch.nn.Module, ids: list[int]) -> Callable[[int | None], float]:
    """token -> its log-probability after the prompt; None -> the likeliest token."""
    said = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return lambda token: float(said.argmax() if token is None else said[token])
