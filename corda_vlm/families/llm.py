"""Language models of transformers: Llama and those built like it, Phi, Phi-3, GPT-2.

An architecture is the list of its blocks' weight matrices, as data. To add one:

    from corda_vlm.families import block_rules, register_family
    from corda_vlm.families.llm import LLAMA, family

    rules = block_rules(r"model\\.layers", "language", LLAMA)
    register_family(family("mine", ("my_model_type",), rules))

Embeddings and the output layer (often one matrix) are no sites.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from corda_vlm.families.base import Family, Generative, Layers, Rule, block_rules, class_of
from corda_vlm.families.generative import decoder
from corda_vlm.families.loading.hub import reads

QKV: Layers = tuple((f"self_attn.{role}_proj", role, "attn.in") for role in ("q", "k", "v"))

LLAMA: Layers = (
    *QKV,
    ("self_attn.o_proj", "o", "attn.out"),
    ("mlp.gate_proj", "gate", "mlp.in"),
    ("mlp.up_proj", "up", "mlp.in"),
    ("mlp.down_proj", "down", "mlp.mid"),
)
PHI3: Layers = (
    ("self_attn.qkv_proj", "qkv", "attn.in"),
    ("self_attn.o_proj", "o", "attn.out"),
    ("mlp.gate_up_proj", "gate_up", "mlp.in"),
    ("mlp.down_proj", "down", "mlp.mid"),
)
PHI: Layers = (
    *QKV,
    ("self_attn.dense", "o", "attn.out"),
    # beside the attention, not after it: both read one normalized input
    ("mlp.fc1", "up", "attn.in"),
    ("mlp.fc2", "down", "mlp.mid"),
)
GPT2: Layers = (
    ("attn.c_attn", "qkv", "attn.in"),
    ("attn.c_proj", "o", "attn.out"),
    ("mlp.c_fc", "up", "mlp.in"),
    ("mlp.c_proj", "down", "mlp.mid"),
)

# model_type -> where its blocks are within the decoder, and what is in one
ARCHITECTURES: dict[str, tuple[str, Layers]] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "smollm3",
            "olmo2",
        ),
        ("layers", LLAMA),
    ),
    "phi": ("layers", PHI),
    "phi3": ("layers", PHI3),
    "gpt2": ("h", GPT2),
}


def rules(prefix: str) -> tuple[Rule, ...]:
    """The rules of all architectures, of a decoder whose dotted path begins with `prefix` (a regular expression).

    Architectures that name a layer alike read the same input with it, so their rules do not contradict each other.
    """
    found = (
        rule
        for blocks, layers in dict.fromkeys(ARCHITECTURES.values())
        for rule in block_rules(prefix + blocks, "language", layers)
    )
    return tuple(dict.fromkeys(found))


def family(
    name: str,
    model_types: tuple[str, ...],
    rules: tuple[Rule, ...],
    **fields: Any,
) -> Family:
    """A family of models of transformers that generate text, to `register_family`.

    Args:
        model_types: `model_type` of their configurations.
        rules: of `base.block_rules`.
        fields: of `Family`, in place of those that language models have.
    """

    def matches(model: nn.Module) -> bool:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        return kind in model_types and bool(class_of(model, "transformers"))

    return Family(
        **{
            "name": name,
            "matches": matches,
            "rules": rules,
            "forward": decoder.forward,
            "generative": Generative(decoder.choose_tokens),
            "load": decoder.loader("AutoModelForCausalLM"),
            "reads": reads(*model_types),
            "classes": model_types,
            "towers": lambda model: ("language",),
            "refuses": decoder.quantised,
            "model_types": model_types,
            **fields,
        }
    )


LLM = family(
    "llm",
    tuple(ARCHITECTURES),
    rules(r"(?:model\.|transformer\.)?"),
)
