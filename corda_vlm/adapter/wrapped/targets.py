"""Which modules PEFT is told to wrap, with which ranks, and whether it has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from torch import nn

from corda_vlm.adapter.paired import PairedLayer, base_of
from corda_vlm.adapter.wrapped.carriers import carriers
from corda_vlm.errors import CordaError
from corda_vlm.families.layers.conv2d import not_in_peft
from corda_vlm.families.layers.experts import Slice
from corda_vlm.families.layers.walk import inner_layer


def anchored(names: Iterable[str]) -> str:
    """A regular expression that matches exactly these dotted names.

    PEFT matches a *list* of targets by suffix: on open_clip `transformer.resblocks.0.mlp.c_fc`, the text
    tower's, would adapt `visual.transformer.…` too.
    """
    return "^(?:" + "|".join(re.escape(name) for name in names) + ")$"


def lora_targets(
    ranks: Mapping[str, int],
    rank: int | None = None,
    slices: Mapping[str, Slice] | None = None,
    *,
    plain: bool = False,
) -> dict[str, Any]:
    """The fields of a `LoraConfig` that give each site its rank, alpha equal to it (so scaling 1), no dropout.

    Args:
        rank: the config's own, from which patterns differ; None takes the most common.
        slices: of `site_slices`: which sites are experts or routers, which PEFT adapts as parameters.
        plain: for PEFT's own LoRA, see `as_parameters`.

    Raises:
        CordaError: experts of one parameter with different ranks.
    """
    slices = slices or {}
    rank = rank or Counter(ranks.values()).most_common(1)[0][0]
    modules, parameters = as_parameters(ranks, slices, plain=plain)
    by_parameter = _one_rank_each(ranks, parameters)
    keyed = {name: ranks[name] for name in modules} | by_parameter
    odd = {f"^{re.escape(name)}": r for name, r in keyed.items() if r != rank}
    fields: dict[str, Any] = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": anchored(modules),
        "rank_pattern": odd,
        "alpha_pattern": dict(odd),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    if slices:
        fields["target_parameters"] = list(by_parameter) or None
        if plain or not modules:
            fields["target_modules"] = modules
    return fields


# PEFT reads a target of this name as one of transformers 4, and takes all experts of transformers 5 for it.
_RENAMED = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})


def as_parameters(
    sites: Iterable[str], slices: Mapping[str, Slice], *, plain: bool
) -> tuple[list[str], dict[str, str]]:
    """The sites that PEFT adapts as modules, and those that it adapts as parameters -> the parameter's dotted path.

    PEFT converts the targets of a plain LoRA on a mixture from transformers 4: a pattern it takes apart, and `shared_expert.up_proj`
    it takes for the experts. So there the modules are a list, and those with such a name are adapted as the parameter that
    their weight is, by equal numbers.
    """
    modules, parameters = [], {}
    for site in sites:
        if site in slices:
            parameters[site] = slices[site].path
        elif plain and slices and site.rpartition(".")[2] in _RENAMED:
            parameters[site] = f"{site}.weight"
        else:
            modules.append(site)
    return modules, parameters


def _one_rank_each(ranks: Mapping[str, int], parameters: Mapping[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for site, path in parameters.items():
        if found.setdefault(path, ranks[site]) != ranks[site]:
            raise CordaError(
                f"{site} has rank {ranks[site]} and another expert of {path} {found[path]}: PEFT has one rank for a parameter"
            )
    return found


def unlike_in_peft(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Those of these layers that PEFT's own LoRA takes for others, and what it leaves out."""
    wanted = set(names)
    layers = {
        name: inner_layer(module)
        for name, module in base_of(model).named_modules()
        if name in wanted
    }
    return {
        name: why
        for name, layer in layers.items()
        if isinstance(layer, nn.Conv2d) and (why := not_in_peft(layer))
    }


def refuse_convolutions(model: nn.Module, names: Iterable[str], start: str) -> None:
    """Raise a `CordaError` where one of these layers is a convolution, for which PEFT has no such start."""
    wanted = set(names)
    for name, module in model.named_modules():
        if name in wanted and isinstance(module, nn.Conv2d):
            raise CordaError(
                f"PEFT starts {start!r} for nn.Linear alone, and {name!r} is a convolution; leave it out (towers=, roles=, "
                "targets=), or take another method"
            )


def check_wrapped(peft_model: PeftModel, ranks: Mapping[str, int], adapter_name: str) -> None:
    """Raise unless exactly these modules carry the adapter, with these ranks and scaling 1, and as the layers that they are."""
    layers = {
        site: carrier.layer
        for carrier in carriers(peft_model, adapter_name)
        for site in carrier.sites
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
    plain = [name for name, layer in layers.items() if not isinstance(layer, PairedLayer)]
    for name, why in unlike_in_peft(peft_model, plain).items():
        raise CordaError(
            f"PEFT's LoRA of a convolution knows no {why.partition(' ')[0]}, which {name!r} has ({why}): leave that layer out "
            "(targets=, roles=), or take a method of this package, such as corda-kpm, whose layer does"
        )
