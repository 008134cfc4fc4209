"""Run by `test_lm_eval.py` with lm-eval's own interpreter: a live model with an adapter, and its export, on the same tasks.

python lm_eval_live.py MODEL TASKS OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from corda_vlm import attach_adapter, export_adapter, load_model, plan_adapter
from corda_vlm.integrations.lm_eval import evaluate

TASKS = ["capitals", "sums"]


def main(source: str, tasks: str, output: str) -> None:
    out = Path(output)
    loaded = load_model(source, dtype=torch.float32)
    evaluate(
        loaded.model, TASKS, processor=loaded.processor, output=out / "before", include_path=tasks
    )
    torch.manual_seed(0)
    plan = plan_adapter(loaded.model, None, method="pissa", rank=4, show_progress=False)
    model = attach_adapter(loaded.model, plan)
    with torch.no_grad():  # as if it had been trained
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.train()
    evaluate(model, TASKS, processor=loaded.processor, output=out / "live", include_path=tasks)
    assert model.training
    export_adapter(model, out / "exported", format="merged")


if __name__ == "__main__":
    main(*sys.argv[1:])
