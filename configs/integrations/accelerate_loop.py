"""A loop of your own with Accelerate: CorDA's start, the anchor and distillation as two terms of the loss.

    python configs/integrations/accelerate_loop.py --steps 20 --output trained
    accelerate launch configs/integrations/accelerate_loop.py --steps 20 --output trained
    python configs/integrations/accelerate_loop.py --steps 40 --output trained --resume

Versions: accelerate 1.0 or later (run with 1.15), PEFT 0.21 or later.

Expect: `loss` falls, `anchor` and `distill` begin at 0 and stay small. The state goes to `trained/state`, from which
`--resume` goes on; `trained/lora` is a plain LoRA on the original model, for PEFT.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from corda_vlm import (
    anchor_penalty,
    asset,
    attach_adapter,
    collect_covariance,
    export_adapter,
    load_model,
    plan_adapter,
)
from corda_vlm.data import load_records, make_batches
from corda_vlm.train.terms import distillation

KNOWLEDGE = {"source": f"parquet:{asset('model_zoo')}/shapes-llava/data/*.parquet", "format": "qa", "split": "train"}  # fmt: skip
TASK = {"source": "sklearn:digits", "format": "qa", "question": "Which digit is this?", "answer": "{label}", "split": "train"}  # fmt: skip


class Progress:
    """How many steps were made, which `save_state` keeps and `load_state` brings back."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def main(words: Sequence[str] | None = None) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="shapes-llava")
    parser.add_argument("--output", type=Path, default=Path("trained"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=256, help="records of the knowledge")
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args(words)
    set_seed(0)

    accelerator = Accelerator()
    loaded = load_model(asked.model)
    known, new = load_records(KNOWLEDGE), load_records(TASK)
    batches = make_batches(
        known, loaded.processor, batch_size=asked.batch_size, shuffle=True, limit=asked.samples, must_learn=True
    )  # fmt: skip
    towers = "projector,language"
    with accelerator.main_process_first():  # one process calibrates, the others read its file
        asked.output.mkdir(parents=True, exist_ok=True)
        store = collect_covariance(
            loaded.model, batches, towers=towers, path=asked.output / "covariance.safetensors"
        )
    plan = plan_adapter(loaded.model, store, mode="kpm", rank=8, a_norm=10.0, towers=towers)
    model = attach_adapter(loaded.model, plan).to(accelerator.device)

    # both before the first step: what the model gives now counts as no change
    anchor = anchor_penalty(model, store)
    distill = distillation(model, batches)

    learning = make_batches(new, loaded.processor, batch_size=asked.batch_size, must_learn=True)
    loader = torch.utils.data.DataLoader(
        range(len(new)),  # pyright: ignore[reportArgumentType] # numbers, of which the next line makes batches
        batch_size=asked.batch_size,
        shuffle=True,
        collate_fn=learning.builder.batch,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.0)
    progress = Progress()
    parallel, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(progress)
    state, log = asked.output / "state", []
    if asked.resume:
        accelerator.load_state(str(state))

    while progress.step < asked.steps:
        for batch in loader:
            kept, near = anchor(), distill(progress.step)  # functions of the weights and the step
            loss = parallel(**batch).loss
            accelerator.backward(loss + 10.0 * kept + 3.0 * near)
            optimizer.step()
            optimizer.zero_grad()
            log.append({"loss": loss.item(), "anchor": kept.item(), "distill": near.item()})
            accelerator.print(json.dumps({"step": progress.step, **log[-1]}))
            progress.step += 1
            if progress.step >= asked.steps:
                break
    accelerator.save_state(str(state))
    if accelerator.is_main_process:
        export_adapter(model, asked.output / "lora", format="lora", source=asked.model)
    return model, log


if __name__ == "__main__":
    main()
