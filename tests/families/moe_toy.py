"""Tiny mixtures of experts, of the real classes with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t

from tests.families.language_toy import SPECIAL, TEXT

_MOE: dict[str, Any] = {**TEXT, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
_MLA: dict[str, Any] = {
    **_MOE, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip

# name of the classes -> what its configuration takes
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", {**_MOE, "num_experts": 4, "head_dim": 8}),
    "olmoe": ("Olmoe", {**TEXT, "num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoe", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOss", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "deepseek_v2": ("DeepseekV2", _MLA),
    "deepseek_v3": ("DeepseekV3", _MLA),
    "llama4_text": (
        "Llama4", {**TEXT, "intermediate_size_mlp": 40, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8},
    ),
}  # fmt: skip


def make(name: str) -> Any:
    """A mixture whose weights are random, stacks and routers included, and large enough for the router to decide."""
    torch.manual_seed(0)
    kind, options = MIXTURES[name]
    config = getattr(t, f"{kind}TextConfig" if name == "llama4_text" else f"{kind}Config")
    model = getattr(t, f"{kind}ForCausalLM")(config(**options | SPECIAL)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter.data, std=0.15)
    return model
