"""A language model with an adapter that has learned something, for the tests of what serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from corda_vlm import attach_adapter, load_model, plan_adapter
from corda_vlm.adapter.exchange.factors import changes


def learned(source: Path, **options: Any) -> PeftModel:
    """The model of a folder, with an adapter of rank 8 that is no longer as it started."""
    model = load_model(str(source), dtype=torch.float32).model
    plan = plan_adapter(model, None, method="pissa", rank=8, show_progress=False)
    attached = attach_adapter(model, plan, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return attached.eval()


def products(model: PeftModel) -> dict[str, Tensor]:
    """Site -> what was added to its weight."""
    return {site: B @ A for site, (B, A) in changes(model, "default").items()}
