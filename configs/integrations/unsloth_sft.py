"""Unsloth trains from a start of ours: it loads a folder with an adapter together with its base.

    corda-vlm calibrate MODEL "{source: jsonl:nq_open_dev_3610.jsonl, format: qa}" --samples 256
    corda-vlm plan MODEL --covariance covariance.safetensors --mode kpm --a-norm 10 --rank 16
    corda-vlm export MODEL plan.json start --format lora
    python configs/integrations/unsloth_sft.py start train.jsonl

Not `FastLanguageModel.get_peft_model` after it: that is for a model without an adapter. `load_in_4bit=True` takes `--format lora`,
which never touches the base; `--format residual` is the CorDA of the paper, on `start/base` in 16 bits.

Versions: written for Unsloth 2026.10.9 (PEFT 0.18 or later, transformers up to 5.17). It wants a GPU, and has not been run: its
unsloth/models/loader.py was read, which loads the base that the adapter names and then the adapter, `is_trainable=True`.

Expect: the first loss is that of the model itself; `trained/` is a LoRA for PEFT and vLLM.
"""

from __future__ import annotations

import sys


def main(start: str, data: str) -> None:
    from unsloth import FastLanguageModel  # first: it patches the others  # isort: skip  # pyright: ignore[reportMissingImports]
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    model, tokenizer = FastLanguageModel.from_pretrained(start, max_seq_length=1024, load_in_4bit=False)  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig("trained", max_steps=200, learning_rate=5e-5, logging_steps=1, report_to=[]),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        processing_class=tokenizer,
    )
    trainer.train()
    model.save_pretrained("trained")


if __name__ == "__main__":
    main(*sys.argv[1:])
