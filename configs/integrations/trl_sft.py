"""TRL's SFTTrainer: a language model learns from prompts and completions, held to what it knew by distillation and the anchor.

    python configs/integrations/trl_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --knowledge "{source: jsonl:nq_open_dev_3610.jsonl, format: qa}" --data train.jsonl --steps 200 --output trained

`train.jsonl` has TRL's columns: `prompt` and `completion`, or `messages`. `--resume` goes on from the last checkpoint.

Versions: TRL 0.20 or later (run with 1.16.0, transformers 5.24, PEFT 0.21.2).

Expect: the first line of the log has `anchor` 0 and `distill` 0, as the adapter starts where the base is. `trained/lora` is a
plain LoRA on the original model, for PEFT, vLLM and what else reads PEFT's format.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from corda_vlm import (
    AnchorMixin,
    attach_adapter,
    collect_covariance,
    export_adapter,
    load_model,
    plan_adapter,
)
from corda_vlm.data import load_records, make_batches
from corda_vlm.data.spec import parse_spec
from corda_vlm.yaml_file import parse_yaml


class HeldTrainer(AnchorMixin, SFTTrainer):
    """The whole change to a training script: one base class."""


def main(words: Sequence[str] | None = None) -> HeldTrainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--knowledge", required=True, help="a data spec, what is to be kept")
    parser.add_argument("--data", required=True, help="JSON lines with TRL's columns")
    parser.add_argument("--output", type=Path, default=Path("trained"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=256, help="records of the knowledge")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args(words)

    loaded = load_model(asked.model)
    processor: Any = loaded.processor
    known = load_records(parse_spec(parse_yaml(asked.knowledge, "--knowledge")))
    batches = make_batches(
        known, loaded.processor, batch_size=asked.batch_size, shuffle=True, limit=asked.samples, must_learn=True
    )  # fmt: skip
    asked.output.mkdir(parents=True, exist_ok=True)
    store = collect_covariance(loaded.model, batches, path=asked.output / "covariance.safetensors")
    plan = plan_adapter(loaded.model, store, mode="kpm", rank=16, a_norm=10.0)
    model = attach_adapter(loaded.model, plan)

    trainer = HeldTrainer(
        model=model,  # with its adapter: no peft_config
        args=SFTConfig(
            str(asked.output),
            max_steps=asked.steps,
            per_device_train_batch_size=asked.batch_size,
            learning_rate=1e-4,
            max_length=512,
            logging_steps=1,
            save_steps=max(1, asked.steps // 2),
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
        ),
        train_dataset=load_dataset("json", data_files=asked.data, split="train"),
        processing_class=processor.tokenizer,
    )
    trainer.anchor_to(store, weight=10.0)
    trainer.distill_from(batches, weight=3.0)
    trainer.train(resume_from_checkpoint=asked.resume)
    export_adapter(model, asked.output / "lora", format="lora", source=asked.model)
    return trainer


if __name__ == "__main__":
    main()
