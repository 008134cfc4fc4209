"""TRL's SFTTrainer on a vision-language model: shapes-llava learns digits, held to what it knew by distillation and the anchor.

    python configs/integrations/trl_sft_vlm.py --steps 20 --output trained
    python configs/integrations/trl_sft_vlm.py --steps 40 --output trained --resume

Versions: TRL 1 (run with 1.16.0, transformers 5.24, PEFT 0.21.2).

Expect: the first line of the log has `anchor` 0 and `distill` 0; the loss falls. `trained/lora` is a plain LoRA on the original
model. Any other model goes as this one does: `--model llava-hf/llava-1.5-7b-hf`, with data of yours in place of `digits()`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

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

KNOWLEDGE = {"source": f"parquet:{asset('model_zoo')}/shapes-llava/data/*.parquet", "format": "qa", "split": "train"}  # fmt: skip


class HeldTrainer(AnchorMixin, SFTTrainer):
    """The whole change to a training script: one base class."""


def digits(limit: int) -> Dataset:
    """Handwritten digits as conversations, in TRL's columns `images`, `prompt` and `completion`."""
    records = load_records({"source": "sklearn:digits", "split": "train", "limit": limit})
    rows: list[dict[str, Any]] = []
    for number in range(len(records)):
        record = records.get(number)
        assert record is not None
        rows.append(
            {
                "images": [record["image"].convert("RGB")],
                "prompt": [{"role": "user", "content": "Which digit is this?"}],
                "completion": [{"role": "assistant", "content": str(record["label"])}],
            }
        )
    return Dataset.from_list(rows)


def main(words: Sequence[str] | None = None) -> HeldTrainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="shapes-llava")
    parser.add_argument("--output", type=Path, default=Path("trained"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=256, help="records of the knowledge")
    parser.add_argument("--limit", type=int, default=1000, help="digits to learn from")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args(words)

    loaded = load_model(asked.model)
    processor: Any = loaded.processor
    batches = make_batches(
        load_records(KNOWLEDGE), loaded.processor, batch_size=asked.batch_size, shuffle=True,
        limit=asked.samples, must_learn=True,
    )  # fmt: skip
    towers = "projector,language"
    asked.output.mkdir(parents=True, exist_ok=True)
    store = collect_covariance(
        loaded.model, batches, towers=towers, path=asked.output / "covariance.safetensors"
    )
    plan = plan_adapter(loaded.model, store, mode="kpm", rank=8, a_norm=10.0, towers=towers)
    model = attach_adapter(loaded.model, plan)

    trainer = HeldTrainer(
        model=model,  # with its adapter: no peft_config
        args=SFTConfig(
            str(asked.output),
            max_steps=asked.steps,
            per_device_train_batch_size=asked.batch_size,
            learning_rate=5e-4,
            lr_scheduler_type="constant",
            max_length=None,  # an image's tokens must not be cut
            logging_steps=1,
            save_steps=max(1, asked.steps // 2),
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
        ),
        train_dataset=digits(asked.limit),
        processing_class=processor.hf_processor,  # transformers' own
    )
    trainer.anchor_to(store, weight=10.0)
    trainer.distill_from(batches, weight=3.0)
    trainer.train(resume_from_checkpoint=asked.resume)
    export_adapter(model, asked.output / "lora", format="lora", source=asked.model)
    return trainer


if __name__ == "__main__":
    main()
