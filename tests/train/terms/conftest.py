"""What the tests of terms share: weights to compare, a kill, and questions that a tiny language model is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from corda_vlm.data import load_records
from corda_vlm.data.text.chat_options import ChatOptions

OPTIONS: dict[str, Any] = {
    "steps": 8,
    "batch_size": 16,
    "log_every": 2,
    "bf16": False,
    "learning_rate": 1e-2,
}
PLAIN = ChatOptions(chat_template="plain")
SPOKEN: dict[str, Any] = {
    **OPTIONS,
    "loss": "next_token",
    "chat_template": "plain",
    "steps": 6,
    "batch_size": 4,
}


class Stop(TrainerCallback):
    """Raises in the midst of a training, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise RuntimeError("killed")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = [{"question": f"is {i} even?", "answer": "no" if i % 2 else "yes"} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_records({"source": f"jsonl:{path}", "format": "qa"})


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def moved(model, by: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
