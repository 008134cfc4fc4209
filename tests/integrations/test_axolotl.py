"""axolotl from both exports of a start, in an environment of its own, with the PEFT that it pins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from corda_vlm import asset
from tests.integrations.plain import departure
from tests.integrations.starts import ASKED, logits, losses

pytestmark = [pytest.mark.slow, pytest.mark.unchecked]
RECIPE = asset("configs/integrations/axolotl.yaml")
SMALL = {"gradient_accumulation_steps": 1, "save_steps": 2, "sequence_len": 64, "lr_scheduler": "constant",
         "special_tokens": {"pad_token": "<|endoftext|>"}, "bf16": False, "dataset_num_proc": 1,
         "dataset_prepared_path": "prepared", "num_epochs": 2}  # fmt: skip


def train(tool: Any, folder: Path, **changed: Any) -> None:
    """Run the recipe with some of its values changed."""
    asked = {**yaml.safe_load(RECIPE.read_text(encoding="utf-8")), **SMALL, **changed}
    (folder / "small.yaml").write_text(yaml.safe_dump(asked), encoding="utf-8")
    tool.run("-m", "axolotl.cli.train", "small.yaml", cwd=folder, AXOLOTL_DO_NOT_TRACK="1")


@pytest.mark.parametrize("format", ["residual", "lora"])
def test_recipe(tool, starts, smollm2_4, format, tmp_path, measured):
    """starts at the base, trains, resumes, and its own PEFT loads the result"""
    start = starts[format]
    base = start / "base" if format == "residual" else smollm2_4
    before = logits(tool, smollm2_4, None, tmp_path)
    at_start = departure(logits(tool, base, start, tmp_path), before)
    assert at_start < 1e-4
    data = {"path": str(start.parent / "task.json"), "ds_type": "json", "type": "alpaca"}
    asked = {"base_model": str(base), "lora_model_dir": str(start), "datasets": [data]}
    train(tool, tmp_path, **asked, max_steps=2)
    first = losses(tmp_path / "trained", 2)
    train(tool, tmp_path, **asked, max_steps=4, resume_from_checkpoint="trained/checkpoint-2")
    whole = losses(tmp_path / "trained", 4)
    assert whole[:2] == first
    assert len(whole) == 4
    after = departure(logits(tool, base, tmp_path / "trained", tmp_path), before)
    assert after > 10 * at_start
    measured(f"{format}: start off by {at_start:.0e}, loss {whole[0]:.3f} to {whole[-1]:.3f}")


FOUR_BITS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
base, start, text = sys.argv[1:]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32).eval()
ids = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt").input_ids
before = model(input_ids=ids).logits
model = PeftModel.from_pretrained(model, start, is_trainable=True)
after = model(input_ids=ids).logits
after.logsumexp(-1).sum().backward()
moved = [p for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
kinds = {type(m).__name__ for m in model.modules()}
print("APART", float((after - before).abs().max()), len(moved), "Linear4bit" in kinds)
"""


def test_four_bits(tool, starts, smollm2_4, tmp_path, measured):
    """the lora start on a base of 4 bits (bitsandbytes): outputs are those of the base, and its factors get gradients"""
    said = tool.run("-c", FOUR_BITS, smollm2_4, starts["lora"], ASKED, cwd=tmp_path)
    apart, moved, quantized = said.split("APART ")[1].split()[:3]
    assert quantized == "True"
    assert float(apart) == 0.0
    assert int(moved) > 0
    measured(f"outputs differ by {apart}, {moved} factors get gradients")
