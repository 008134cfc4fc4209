"""transformers' Trainer: a LLaVA learns digits from a CorDA start, held to what it knew by the anchor and distillation.

    python configs/integrations/trainer.py --steps 20 --output trained
    python configs/integrations/trainer.py --steps 40 --output trained --resume    # goes on from the last checkpoint
    python configs/integrations/trainer.py --steps 100 --output kept --keep 0.95   # keeps 95 % of what a probe tells it knows

Versions: transformers 5, PEFT 0.21 or later (run with 5.24 and 0.21.2); on transformers 4 for models without images.

Expect: `anchor` and `distill` are 0 in the first line of the log, as the adapter starts where the base is, and stay small
while `loss` falls. With `--keep` the log has `keep`, the share that is kept of what the model knew of other records than those it is held
to, and `keep_weight`, the weight of `distill` that is steered for it; at the end the largest strength that keeps the share is taken,
which the last line tells. `trained/lora` is a plain LoRA on the original model: `PeftModel.from_pretrained(base, "trained/lora")`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from corda_vlm import (
    AnchorMixin,
    asset,
    attach_adapter,
    collect_covariance,
    export_adapter,
    load_model,
    plan_adapter,
)
from corda_vlm.data import load_records, make_batches
from corda_vlm.train import forgetting_budget

KNOWLEDGE = {"source": f"parquet:{asset('model_zoo')}/shapes-llava/data/*.parquet", "format": "qa", "split": "train"}  # fmt: skip
PROBE = {**KNOWLEDGE, "split": "val"}  # no term of the loss looks at it
TASK = {"source": "sklearn:digits", "format": "qa", "question": "Which digit is this?", "answer": "{label}", "split": "train"}  # fmt: skip


class HeldTrainer(AnchorMixin, Trainer):
    """The whole change to a training script: one base class."""


def main(words: Sequence[str] | None = None) -> HeldTrainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="shapes-llava")
    parser.add_argument("--output", type=Path, default=Path("trained"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=256, help="records of the knowledge")
    parser.add_argument("--keep", type=float, help="share of the knowledge to keep, e.g. 0.95")
    parser.add_argument("--probe", type=int, default=400, help="records that tell what is kept")
    parser.add_argument("--every", type=int, default=10, help="steps between two looks at them")
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args(words)
    torch.manual_seed(0)

    loaded = load_model(asked.model)
    known, new = load_records(KNOWLEDGE), load_records(TASK)
    # what is to be kept, with labels on its answers for distillation
    batches = make_batches(
        known, loaded.processor, batch_size=asked.batch_size, shuffle=True, limit=asked.samples, must_learn=True
    )  # fmt: skip
    towers = "projector,language"
    asked.output.mkdir(parents=True, exist_ok=True)
    store = collect_covariance(
        loaded.model, batches, towers=towers, path=asked.output / "covariance.safetensors"
    )
    plan = plan_adapter(loaded.model, store, mode="kpm", rank=8, a_norm=10.0, towers=towers)
    model = attach_adapter(loaded.model, plan)

    learning = make_batches(new, loaded.processor, batch_size=asked.batch_size, must_learn=True)
    trainer = HeldTrainer(
        model,
        TrainingArguments(
            str(asked.output),
            max_steps=asked.steps,
            per_device_train_batch_size=asked.batch_size,
            learning_rate=5e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=max(1, asked.steps // 2),
            save_only_model=False,
            report_to=[],
        ),
        train_dataset=range(len(new)),  # pyright: ignore[reportArgumentType] # numbers, of which the next line makes batches
        data_collator=learning.builder.batch,
    )
    trainer.anchor_to(store, weight=10.0)
    trainer.distill_from(batches, weight=3.0)
    if asked.keep is not None:  # before a checkpoint is loaded: what it knows now is the measure
        probe = load_records({**PROBE, "limit": asked.probe})
        trainer.keep(
            forgetting_budget(
                model, probe, asked.keep, processor=loaded.processor, term="distill", every=asked.every
            )
        )  # fmt: skip
    trainer.train(resume_from_checkpoint=asked.resume)
    export_adapter(model, asked.output / "lora", format="lora", source=asked.model)
    if asked.keep is not None:
        print(trainer.spent)
    return trainer


if __name__ == "__main__":
    main()
