"""What we export is read by the PEFT that LLaMA-Factory, ms-swift and others have been pinned to, in a process without us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from corda_vlm.adapter import attach_adapter, export_adapter
from corda_vlm.plan import plan_adapter
from tests.families.language_toy import LANGUAGE

READ = """
import json, sys, warnings
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

ids, found = torch.arange(3, 15)[None], {}
for base, adapter, where in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, adapter, **where).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    told = [str(one.message) for one in seen if "gradient_checkpointing" not in str(one.message)]
    found[adapter] = {"logits": logits.flatten().tolist(), "warnings": told}
assert "corda_vlm" not in sys.modules
print("FOUND" + json.dumps(found))
"""


@pytest.mark.slow
def test_exports(tool, tmp_path: Path, measured):
    """reads lora and both layouts of residual without a warning, with the outputs that were exported"""
    model = LANGUAGE["llama"]().eval()
    model.save_pretrained(tmp_path / "original")
    plan = plan_adapter(model, None, method="pissa", rank=3, show_progress=False)
    attached = attach_adapter(model, plan)
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape))
        want = attached(input_ids=torch.arange(3, 15)[None]).logits.flatten()
    lora = export_adapter(attached, tmp_path / "lora")
    ours = export_adapter(attached, tmp_path / "ours", format="residual")
    theirs = export_adapter(attached, tmp_path / "theirs", format="residual", layout="peft")
    jobs = [
        (str(tmp_path / "original"), str(lora), {}),
        (str(ours / "base"), str(ours), {}),
        (str(theirs), str(theirs), {"subfolder": "corda_trained"}),
    ]
    said = tool.run("-c", READ, json.dumps(jobs), cwd=tmp_path, PYTHONPATH="")
    found = json.loads(said.partition("FOUND")[2].splitlines()[0])
    assert len(found) == 3
    errors = []
    for adapter, result in found.items():
        assert result["warnings"] == [], adapter
        errors.append(float((torch.tensor(result["logits"]) - want).abs().max() / want.abs().max()))
    assert max(errors) < 1e-4
    measured(f"its outputs are ours within {max(errors):.0e}")
