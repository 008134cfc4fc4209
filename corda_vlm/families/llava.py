"""Vision-language models of transformers, from LLaVA to Qwen3.5: see `architectures.vision_language.LAYOUTS`.

Each is a vision tower, a projector and a language model. Rules match whole paths, so a `q_proj` of one tower is never that
of another. To add one whose parts are known: a row of `LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

from corda_vlm.families import llm
from corda_vlm.families.architectures.decoders import DECODERS
from corda_vlm.families.architectures.vision import vision_rules
from corda_vlm.families.architectures.vision_language import LAYOUTS, Layout
from corda_vlm.families.base import Batch, Family, Generative, Masking, Rule, unwrap
from corda_vlm.families.generative import decoder
from corda_vlm.families.llava_names import to_transformers

_WITHIN = r"(?:model\.)?"


def layout_of(model: Any) -> Layout:
    """The row of a bare model."""
    return LAYOUTS[model.config.model_type]


def rules(model: Any) -> tuple[Rule, ...]:
    """The rules of a bare model, which depend on the vision tower and on the language model that are in it."""
    layout, config = layout_of(model), model.config
    language = rf"{_WITHIN}{re.escape(layout.language)}\."
    return (
        *vision_rules(config.vision_config, rf"{_WITHIN}{re.escape(layout.vision)}"),
        *(_projector_rule(*row) for row in layout.projector),
        *llm.rules(config.get_text_config().model_type, language),
    )


def _projector_rule(path: str, role: str, stream: str) -> Rule:
    pattern = re.escape(path).replace(r"\*", r"(?P<number>\d+)")
    return Rule(rf"{_WITHIN}{pattern}", "projector", role, stream.replace("*", "{number}"))


def canonical(model: nn.Module, name: str) -> str:
    """The path of a layer in transformers 5, which the rules are written for."""
    return to_transformers(name)


def towers(model: Any) -> tuple[str, ...]:
    """Those that have linear layers."""
    return (
        ("vision", "projector", "language")
        if layout_of(model).projector
        else ("vision", "language")
    )


def projector(model: Any) -> tuple[str, ...]:
    """The paths of the projector's modules."""
    return tuple(to_transformers(f"model.{home}") for home in layout_of(model).home)


def choose_tokens(model: nn.Module, tokens: str) -> Masking:
    """As `decoder.choose_tokens`; of images whatever is no padding counts in each case."""
    bare = unwrap(model)
    of_text = decoder.choose_tokens(bare, tokens)
    of_images = layout_of(bare).patches(bare.config)

    def chosen(batch: Batch) -> Mapping[str, Bool[Tensor, "b l"]]:
        return {**of_text(batch), **of_images(batch)}

    return chosen


def refuses(model: Any) -> str | None:
    """Why a model cannot be adapted, or None."""
    inside = model.config.get_text_config().model_type
    if inside not in DECODERS:
        return f"its language model is a {inside!r}, of which no rule is known. Known: {', '.join(DECODERS)}"
    return llm.refuses(model)


LLAVA: Family = llm.family(
    "llava",
    tuple(LAYOUTS),
    rules,
    load=decoder.loader("AutoModelForImageTextToText"),
    canonical=canonical,
    towers=towers,
    refuses=refuses,
    generative=Generative(choose_tokens, projector),
)
