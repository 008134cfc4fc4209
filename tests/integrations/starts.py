"""Starts of ours for tools that know PEFT alone: a plan of SmolLM2, exported by the verbs as the recipes say."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from corda_vlm.__main__ import main

ASKED = "Question: What is one plus one? Answer: two"


def export_starts(model: Path, folder: Path, *, rank: int = 8) -> dict[str, Path]:
    """Format -> the folder of an export of one start, by the commands of the recipes."""
    known = folder / "known.jsonl"
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}."} for i in range(64)]
    known.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    store, plan = str(folder / "covariance.safetensors"), str(folder / "plan.json")
    spec = f"{{source: 'jsonl:{known}', format: qa}}"
    main(["calibrate", str(model), spec, "--samples=64", f"--output={store}"])
    main(["plan", str(model), f"--covariance={store}", "--mode=kpm", "--a-norm=10", f"--rank={rank}", f"--output={plan}"])  # fmt: skip
    made = {}
    for format in ("residual", "lora"):
        made[format] = folder / f"start-{format}"
        main(["export", str(model), plan, str(made[format]), f"--format={format}"])
    return made


def write_task(folder: Path) -> Path:
    """Sixteen records in Alpaca's columns, as JSON."""
    path = folder / "task.json"
    rows = [
        {"instruction": f"Name colour {i}.", "input": "", "output": "It is blue."}
        for i in range(16)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def losses(folder: Path, step: int) -> list[float]:
    """The losses that a Trainer's checkpoint tells of."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


LOGITS = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, text, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
if adapter != "none":
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
ids = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt").input_ids
with torch.no_grad():
    save_file({"logits": model.eval()(input_ids=ids).logits.contiguous()}, out)
"""


def logits(tool: object, base: Path, adapter: Path | None, folder: Path) -> Tensor:
    """What the tool's own PEFT and transformers make of a base and an adapter, on one text."""
    from safetensors.torch import load_file

    out = folder / "logits.safetensors"
    tool.run("-c", LOGITS, base, adapter or "none", ASKED, out, cwd=folder)  # type: ignore[attr-defined]
    found = load_file(out)["logits"]
    assert torch.isfinite(found).all()
    return found
