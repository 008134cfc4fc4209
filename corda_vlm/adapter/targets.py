"""Which modules PEFT is told to wrap, with which ranks, and whether it has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from corda_vlm.adapter.paired import (
    base_of,
)
from corda_vlm.errors import CordaError


def anchored(names: Iterable[str]) -> str:
    """A regular expression that matches exactly these dotted names.

    PEFT matches a *list* of targets by suffix: on open_clip `transformer.resblocks.0.mlp.c_fc`, the text
    tower's, would adapt `visual.transformer.…` too.
    """
    return "^(?:" + "|".join(re.escape(name) for name in names) + ")$"


def lora_targets(ranks: Mapping[str, int], rank: int | None = None) -> dict[str, Any]:
    """The fields of a `LoraConfig` that give each site its rank, alpha equal to it (so scaling 1), no dropout.

    `rank` is the config's own, from which patterns differ; None takes the most common.
    """
    rank = rank or Counter(ranks.values()).most_common(1)[0][0]
    odd = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": anchored(ranks),
        "rank_pattern": odd,
        "alpha_pattern": dict(odd),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def check_wrapped(peft_model: PeftModel, ranks: Mapping[str, int], adapter_name: str) -> None:
    """Raise unless exactly these modules carry the adapter, with these ranks and scaling 1."""
    layers = {
        name: module
        for name, module in base_of(peft_model).named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }
    wrapped = {name: layer.r[adapter_name] for name, layer in layers.items()}
    for name in sorted(wrapped.keys() | ranks.keys()):
        if wrapped.get(name) != ranks.get(name):
            raise CordaError(
                f"PEFT wrapped {name!r} with rank {wrapped.get(name)} (None: not at all) where the plan says "
                f"{ranks.get(name)}; nothing was attached. Please report this with the model's class."
            )
        if (scaling := layers[name].scaling[adapter_name]) != 1:
            raise CordaError(
                f"PEFT scales the adapter of {name!r} by {scaling} where the plan says 1; nothing was attached. Please "
                "report this with the model's class."
            )
