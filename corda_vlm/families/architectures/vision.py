"""Vision towers inside of models that see and answer, by the `model_type` of their configuration.

Only blocks are declared. Left out are patch embeddings, linear or not, and heads that pool what no language model reads.
The last blocks of a tower that the language model reads from an earlier one (LLaVA's `vision_feature_layer`) are sites as
well: they run, but learn nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from corda_vlm.families.architectures.decoders import ATTENTION, QKV, SWIGLU
from corda_vlm.families.base import Layers, Rule, block_rules
from corda_vlm.families.clip_open import timm_rules

_MLP: Layers = (("mlp.fc1", "up", "mlp.in"), ("mlp.fc2", "down", "mlp.mid"))

CLIP: Layers = (*QKV, ("self_attn.out_proj", "o", "attn.out"), *_MLP)
INTERN: Layers = (
    *((f"attention.{role}_proj", role, "attn.in") for role in ("q", "k", "v")),
    ("attention.projection_layer", "o", "attn.out"),
    *_MLP,
)
_PACKED: Layers = (("attn.qkv", "qkv", "attn.in"), ("attn.proj", "o", "attn.out"))
QWEN2: Layers = (*_PACKED, *_MLP)
QWEN2_5: Layers = (*_PACKED, *SWIGLU)
QWEN3: Layers = (
    *_PACKED,
    ("mlp.linear_fc1", "up", "mlp.in"),
    ("mlp.linear_fc2", "down", "mlp.mid"),
)
PIXTRAL: Layers = (
    *((f"attention.{role}_proj", role, "attn.in") for role in ("q", "k", "v")),
    ("attention.o_proj", "o", "attn.out"),
    ("feed_forward.gate_proj", "gate", "mlp.in"),
    ("feed_forward.up_proj", "up", "mlp.in"),
    ("feed_forward.down_proj", "down", "mlp.mid"),
)
LLAMA4: Layers = (*ATTENTION, *_MLP)  # Mllama and Molmo 2, too
GEMMA4: Layers = tuple(
    (f"{layer}.linear", role, stream) for layer, role, stream in (*ATTENTION, *SWIGLU)
)


def _each_its_own(layers: Layers) -> Layers:
    """Layers of which no two read the same input."""
    return tuple((layer, role, f"{layer}.in") for layer, role, _ in layers)


def _gemma4(config: Any) -> Layers:
    """With `use_clipped_linears` every layer clamps its input to bounds of its own first."""
    return _each_its_own(GEMMA4) if config.use_clipped_linears else GEMMA4


Blocks = tuple[tuple[str, Layers | Callable[[Any], Layers]], ...]
"""Where each list of blocks is within the tower, and what is in one, which the configuration may say."""

TOWERS: dict[str, Blocks] = {
    **dict.fromkeys(
        (
            "clip_vision_model",
            "idefics3_vision",
            "siglip_vision_model",
            "siglip2_vision_model",
            "smolvlm_vision",
        ),
        ((r"encoder\.layers", CLIP),),
    ),
    "gemma4_vision": ((r"encoder\.layers", _gemma4),),
    "glm4v_vision": (("blocks", QWEN2_5),),
    "internvl_vision": ((r"encoder\.layer", INTERN),),
    "llama4_vision_model": ((r"model\.layers", LLAMA4),),
    "mllama_vision_model": ((r"(?:global_)?transformer\.layers", LLAMA4),),
    "molmo2_vision": (("layers", LLAMA4),),
    "pixtral": ((r"transformer\.layers", PIXTRAL),),
    "qwen2_vl_vision": (("blocks", QWEN2),),
    "qwen2_5_vl_vision": (("blocks", QWEN2_5),),
    "qwen3_vl_vision": (("blocks", QWEN3),),
    "qwen3_vl_moe_vision": (("blocks", QWEN3),),
    "qwen3_5_vision": (("blocks", QWEN3),),
}

_TIMM = ("timm_wrapper", "gemma3n_vision")  # a model of timm, which has rules of its own


def vision_rules(config: Any, path: str) -> tuple[Rule, ...]:
    """The rules of a vision tower at `path`, a regular expression; none of one that is not known."""
    kind = type(config).model_type
    if kind in _TIMM:
        return timm_rules(rf"{path}\.timm_model")
    return tuple(
        rule
        for blocks, layers in TOWERS.get(kind, ())
        for rule in block_rules(
            rf"{path}\.{blocks}", "vision", layers(config) if callable(layers) else layers
        )
    )
