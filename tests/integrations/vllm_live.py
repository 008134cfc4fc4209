"""Run by `test_vllm.py` with the interpreter that has vLLM: its own checks and its own loader on an export, without its engine.

python vllm_live.py FOLDER MAX_LORA_RANK OUTPUT
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from safetensors.torch import save_file

LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""The names that vLLM's Llama has for its linear layers."""


def main(folder: str, max_lora_rank: str, output: str) -> None:
    loader: Any = import_module("vllm.lora.lora_model")
    checks: Any = import_module("vllm.lora.peft_helper")
    helper = checks.PEFTHelper.from_local_dir(folder, max_position_embeddings=None)
    told = import_module("vllm.config.lora").LoRAConfig(max_lora_rank=int(max_lora_rank))
    helper.validate_legal(told)
    loader.PIN_MEMORY = False  # there is no driver to pin it for
    model = loader.LoRAModel.from_local_checkpoint(
        folder, LAYERS, helper, lora_model_id=1, device="cpu", model_vocab_size=None
    )
    changes = {}
    for name, layer in model.loras.items():
        A, B = layer.lora_a, layer.lora_b
        changes[name] = (layer.scaling * (B @ A)).contiguous()
    save_file(changes, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
