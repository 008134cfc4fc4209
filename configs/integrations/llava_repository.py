"""The original LLaVA repository (haotian-liu/LLaVA): its `--lora_enable` trains from a start of ours.

    corda-vlm calibrate llava-hf/llava-1.5-7b-hf KNOWLEDGE --towers language
    corda-vlm plan llava-hf/llava-1.5-7b-hf --covariance covariance.safetensors --mode kpm --a-norm 10 --rank 64 --towers language
    corda-vlm export llava-hf/llava-1.5-7b-hf plan.json start --format lora
    python -m corda_vlm.integrations.llava start start-llava
    CORDA_START=start-llava deepspeed configs/integrations/llava_repository.py --lora_enable True --model_name_or_path liuhaotian/llava-v1.5-7b …

The last line runs in the repository's own environment, which needs PEFT and nothing of ours; its words are those of its
scripts/v1_5/finetune_lora.sh, with this file in place of llava/train/train_mem.py. Its --lora_r, --lora_alpha and
--lora_dropout have no effect: the start says what they are.

Versions: written for v1.2.2.post1 (transformers 4.37.2). It installs neither with this package's PyTorch nor from PyPI, so it has not been
run from beginning to end: its llava/train/train.py and llava/model/builder.py were read. What was run is this file with a stand-in
of that training, on shapes-llava's language model.

Expect: the first loss is that of the model itself. `--model-base liuhaotian/llava-v1.5-7b` loads the result there, and
`python -m corda_vlm.integrations.llava checkpoints/llava-lora home --naming transformers` brings it home.
"""

from __future__ import annotations

import os
from typing import Any

import peft

START = os.environ["CORDA_START"]


def started(model: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of PEFT's `get_peft_model`, which train.py imports when it comes to its adapters."""
    return peft.PeftModel.from_pretrained(model, START, is_trainable=True)


if __name__ == "__main__":
    peft.get_peft_model = started
    from llava.train.train import train  # pyright: ignore[reportMissingImports]

    train()
