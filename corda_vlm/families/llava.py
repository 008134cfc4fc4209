"""Vision-language models of transformers: LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL and 2.5-VL, Idefics3, SmolVLM,
PaliGemma, Gemma 3, InternVL.

Each is a vision tower, a projector and a language model; which attribute is which is a line of `LAYOUTS`. Rules match
whole paths, so a `q_proj` of one tower is never that of another. The last blocks of a vision tower that the language
model reads from an earlier one (LLaVA's `vision_feature_layer`) are sites as well: they run, but learn nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from corda_vlm.families import llm
from corda_vlm.families.base import Family, Generative, Layers, Rule, block_rules
from corda_vlm.families.generative import decoder
from corda_vlm.families.llava_names import to_transformers
from corda_vlm.families.llm import QKV

_MLP: Layers = (("mlp.fc1", "up", "mlp.in"), ("mlp.fc2", "down", "mlp.mid"))

CLIP: Layers = (*QKV, ("self_attn.out_proj", "o", "attn.out"), *_MLP)  # SigLIP and Idefics, too
INTERN: Layers = (
    *((f"attention.{role}_proj", role, "attn.in") for role in ("q", "k", "v")),
    ("attention.projection_layer", "o", "attn.out"),
    *_MLP,
)
QWEN: Layers = (
    ("attn.qkv", "qkv", "attn.in"),
    ("attn.proj", "o", "attn.out"),
    *_MLP,
    ("mlp.gate_proj", "gate", "mlp.in"),  # 2.5
    ("mlp.up_proj", "up", "mlp.in"),
    ("mlp.down_proj", "down", "mlp.mid"),
)

# One after another; each linear layer of a projector reads its own input.
_TWO, _ONE = ("linear_1", "linear_2"), ("linear",)


@dataclass(frozen=True)
class Layout:
    """Where a class keeps its parts, as dotted paths within `model.`.

    Attributes:
        blocks: path of the vision tower's list of blocks, and the weight matrices of one.
        projector: its path and the names of its linear layers; None if it has none.
        language: path of the language model.
    """

    blocks: tuple[str, Layers]
    projector: tuple[str, tuple[str, ...]] | None
    language: str = "language_model"


_LLAVA = Layout(("vision_tower.encoder.layers", CLIP), ("multi_modal_projector", _TWO))
_QWEN = Layout(("visual.blocks", QWEN), ("visual.merger.mlp", ("0", "2")))
_IDEFICS = Layout(
    ("vision_model.encoder.layers", CLIP),
    ("connector.modality_projection", ("proj",)),
    "text_model",
)
LAYOUTS: dict[str, Layout] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "paligemma": Layout(_LLAVA.blocks, ("multi_modal_projector", _ONE)),
    "gemma3": Layout(_LLAVA.blocks, None),  # its projection is a bare parameter
    "internvl": Layout(("vision_tower.encoder.layer", INTERN), _LLAVA.projector),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
}
# Language models that have a model_type of their own inside of a vision-language model.
_INSIDE = ("qwen2_vl_text", "qwen2_5_vl_text")


def _rules(layout: Layout) -> tuple[Rule, ...]:
    blocks, layers = layout.blocks
    projector = ()
    if layout.projector is not None:
        path, linears = layout.projector
        projector = tuple(
            Rule(rf"model\.{_escaped(path)}\.{linear}", "projector", "proj", f"{path}.{linear}.in")
            for linear in linears
        )
    return (
        *block_rules(rf"model\.{_escaped(blocks)}", "vision", layers),
        *projector,
        *llm.rules(rf"model\.{_escaped(layout.language)}\."),
    )


def _escaped(path: str) -> str:
    return path.replace(".", r"\.")


def canonical(model: nn.Module, name: str) -> str:
    """The path of a layer in transformers 5, which the rules are written for."""
    return to_transformers(name)


def towers(model: Any) -> tuple[str, ...]:
    """Those that have linear layers."""
    layout = LAYOUTS[model.config.model_type]
    return (
        ("vision", "language") if layout.projector is None else ("vision", "projector", "language")
    )


def projector(model: Any) -> str | None:
    """The path of the projector, if it has linear layers."""
    layout = LAYOUTS[model.config.model_type]
    return None if layout.projector is None else f"model.{layout.projector[0]}"


def refuses(model: Any) -> str | None:
    """Why a model cannot be adapted, or None."""
    inside = model.config.get_text_config().model_type
    if inside not in llm.ARCHITECTURES and inside not in _INSIDE:
        return (
            f"its language model is a {inside!r}, of which no rule is known (a mixture of experts, for one, keeps its "
            f"weights otherwise). Known: {', '.join((*llm.ARCHITECTURES, *_INSIDE))}"
        )
    return decoder.quantised(model)


LLAVA: Family = llm.family(
    "llava",
    tuple(LAYOUTS),
    tuple(dict.fromkeys(rule for layout in LAYOUTS.values() for rule in _rules(layout))),
    load=decoder.loader("AutoModelForImageTextToText"),
    canonical=canonical,
    towers=towers,
    refuses=refuses,
    generative=Generative(decoder.choose_tokens, projector),
)
