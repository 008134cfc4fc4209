"""Run by `test_lmms_eval.py` with lmms-eval's own interpreter: a live model with an adapter, in lmms-eval and in our own measure.

python lmms_eval_live.py TASKS RECORDS OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from corda_vlm import attach_adapter, load_model, plan_adapter
from corda_vlm import evaluate as measure
from corda_vlm.integrations.lmms_eval import evaluate


def main(tasks: str, records: str, output: str) -> None:
    out = Path(output)
    loaded = load_model("shapes-llava", dtype=torch.float32)
    options = {"processor": loaded.processor, "include_path": tasks}
    evaluate(loaded.model, ["seen"], output=out / "before", **options)
    plan = plan_adapter(loaded.model, None, method="pissa", rank=4, show_progress=False)
    model = attach_adapter(loaded.model, plan)
    torch.manual_seed(0)
    with torch.no_grad():  # as if it had been trained
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.train()
    evaluate(model, ["seen"], output=out / "live", **options)
    assert model.training
    task = {
        "name": "seen", "role": "retention", "kind": "vqa", "options": {"max_new_tokens": 8},
        "data": {"source": f"jsonl:{records}", "format": "qa"},
    }  # fmt: skip
    suite = {"name": "seen", "version": 1, "tasks": [task]}
    measure(model, suite, processor=loaded.processor, bf16=False, predictions=out / "ours.jsonl")


if __name__ == "__main__":
    main(*sys.argv[1:])
