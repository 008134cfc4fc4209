"""Language models of transformers, from GPT-2 to Qwen3.5: see `architectures.decoders.DECODERS`.

An architecture is the list of its blocks' weight matrices, as data. To add one:

    from corda_vlm.families import block_rules, register_family
    from corda_vlm.families.llm import LLAMA, family

    rules = block_rules(r"model\\.layers", "language", LLAMA)
    register_family(family("mine", ("my_model_type",), rules))

Embeddings and the output layer (often one matrix) are no sites.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from corda_vlm.families.architectures.decoders import DECODERS, LLAMA
from corda_vlm.families.architectures.mixtures import expert_rules, unknown_experts
from corda_vlm.families.base import Family, Generative, Rule, block_rules, class_of, token_ids
from corda_vlm.families.generative import decoder
from corda_vlm.families.loading.hub import reads

__all__ = ["LLAMA", "LLM", "family", "rules"]


def rules(
    model_type: str, prefix: str = r"(?:(?:model|transformer|gpt_neox)\.)?"
) -> tuple[Rule, ...]:
    """The rules of an architecture, of a decoder whose dotted path begins with `prefix`, a regular expression."""
    blocks, layers = DECODERS[model_type]
    return (
        *block_rules(prefix + blocks, "language", layers),
        *expert_rules(prefix + blocks),
    )


def refuses(model: Any) -> str | None:
    """Why a model cannot be adapted, or None."""
    return unknown_experts(model) or decoder.quantised(model)


def family(
    name: str,
    model_types: tuple[str, ...],
    rules: tuple[Rule, ...] | Callable[[Any], tuple[Rule, ...]],
    **fields: Any,
) -> Family:
    """A family of models of transformers that generate text, to `register_family`.

    Args:
        model_types: `model_type` of their configurations.
        rules: of `base.block_rules`, or model -> those.
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
            "refuses": refuses,
            "model_types": model_types,
            "as_mapping": token_ids,
            **fields,
        }
    )


LLM = family(
    "llm",
    tuple(DECODERS),
    lambda model: rules(model.config.model_type),
)
