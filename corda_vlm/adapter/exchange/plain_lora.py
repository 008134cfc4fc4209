"""The files of a plain LoRA, as every tool reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from corda_vlm.adapter.base import HEADER, save_base
from corda_vlm.adapter.exchange.factors import Factors, plain
from corda_vlm.adapter.folder import ADAPTER, CONFIG
from corda_vlm.adapter.wrapped.parameters import as_peft
from corda_vlm.adapter.wrapped.targets import anchored, as_parameters, unlike_in_peft
from corda_vlm.errors import CordaError
from corda_vlm.families import any_family
from corda_vlm.families.layers.conv1d import is_conv1d
from corda_vlm.families.layers.conv2d import as_kernel
from corda_vlm.families.layers.experts import STACKS, Slice
from corda_vlm.files import write_json
from corda_vlm.sites import site_slices
from corda_vlm.tensors import save_tensors

KNOWN = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_qalora",
        "use_rslora",
    ]
)
"""The fields of `LoraConfig` in PEFT 0.17, the earliest that LLaMA-Factory, ms-swift and vLLM are found with."""


@dataclass(frozen=True)
class LoraBase:
    """The model that a plain LoRA belongs on.

    Attributes:
        model: bare, as it is in memory.
        name: its folder, or its id on a hub, as far as it is known.
        fingerprint: of the model as it is written, noted beside the adapter.
        converted: it is written under transformers' names, and so are the adapter's sites.
    """

    model: nn.Module
    name: str | None
    fingerprint: str
    converted: bool


def save_lora(
    factors: Factors, folder: Path, base: LoraBase, model: PeftModel, adapter_name: str
) -> int:
    """Write a plain LoRA with one rank everywhere, and the modules trained in full beside it; returns the rank."""
    width = max(A.shape[0] for _, A in factors.values())
    full: list[str] = list(getattr(model.peft_config[adapter_name], "modules_to_save", None) or ())
    if full and base.converted:
        raise CordaError(
            f"the names of {full[0]!r} are not converted to transformers'; take format='merged'"
        )
    if unlike := unlike_in_peft(base.model, factors):
        site, why = next(iter(unlike.items()))
        raise CordaError(
            f"a plain LoRA cannot express {len(unlike)} sites, first {site!r}: PEFT's LoRA of a convolution has no "
            f"{why.partition(' ')[0]}, and this one has {why}. Take format='merged', or leave those sites out when planning"
        )
    slices = {} if base.converted else site_slices(base.model)
    config = _config(factors, width, base, full, slices)
    write_json(folder / CONFIG, _lean(config, base))
    tensors = _padded(factors, width, base, slices) | _full_weights(model, adapter_name, full)
    save_tensors(folder / ADAPTER, tensors, {HEADER: base.fingerprint})
    save_base(base.fingerprint, folder)
    if (folder / "base").is_dir():  # for adapters that other tools train on it and write elsewhere
        save_base(base.fingerprint, folder / "base")
    return width


def _padded(
    factors: Factors, width: int, base: LoraBase, slices: Mapping[str, Slice]
) -> dict[str, Tensor]:
    """The factors by PEFT's names and in its shapes, zeros filling up their ranks to one width; see `as_peft` for experts."""
    tensors = {}
    convolutions = {
        name: module for name, module in base.model.named_modules() if isinstance(module, nn.Conv2d)
    }
    stacks: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for site, (B, A) in factors.items():
        spare = width - A.shape[0]
        A, B = F.pad(A, (0, 0, 0, spare)), F.pad(B, (0, spare))  # (width, inp), (out, width)
        part = slices.get(site)
        if part is not None and part.expert is not None:
            stacks.setdefault(part.path, []).append((B, A))
            continue
        if (conv := convolutions.get(site)) is not None:
            A, B = as_kernel(conv, A), B[:, :, None, None]
        tensors |= _named(site, B, A)
    for part in slices.values():
        if part.path in stacks and part.expert == 0:
            pairs = stacks[part.path]
            B, A = torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])
            tensors |= _named(_nested(part, stacks), *as_peft(B, A, part))
    return tensors


def _named(layer: str, B: Tensor, A: Tensor) -> dict[str, Tensor]:
    prefix = f"base_model.model.{layer}"
    return {f"{prefix}.lora_A.weight": A.contiguous(), f"{prefix}.lora_B.weight": B.contiguous()}


def _nested(part: Slice, stacks: Collection[str]) -> str:
    """The layer's name in PEFT: the first parameter of a module is innermost in the wrappers of those after it."""
    later = STACKS[STACKS.index(part.parameter) + 1 :]
    depth = sum(f"{part.module}.{name}" in stacks for name in later)
    return part.module + ".base_layer" * depth


def _full_weights(model: PeftModel, adapter_name: str, full: Sequence[str]) -> dict[str, Tensor]:
    """The trained weights of the modules in `full`, by PEFT's names."""
    if not full:
        return {}
    stored = get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=False
    )
    prefixes = tuple(f"base_model.model.{module}." for module in full)
    return {key: plain(value) for key, value in stored.items() if key.startswith(prefixes)}


def _config(
    factors: Factors,
    width: int,
    base: LoraBase,
    full: Sequence[str],
    slices: Mapping[str, Slice],
) -> LoraConfig:
    modules, parameters = as_parameters(factors, slices, plain=True)
    return LoraConfig(
        r=width,
        lora_alpha=width,
        target_modules=sorted(factors)
        if base.converted
        else _targets(modules, base.model, bool(slices)),
        target_parameters=sorted(set(parameters.values())) or None,
        lora_dropout=0.0,
        bias="none",
        # GPT-2's layers keep their weights transposed; peft warns, and only then sets it by itself
        fan_in_fan_out=not base.converted
        and any(is_conv1d(base.model.get_submodule(site)) for site in modules),
        init_lora_weights=True,
        inference_mode=True,
        modules_to_save=list(full) or None,
        base_model_name_or_path=base.name,
        task_type=None if base.converted else _task_type(base.model),
    )


def _task_type(model: nn.Module) -> str | None:
    """PEFT's name for what a model that generates text is; it has none for one that compares images with texts."""
    generates = any_family(model).generative is not None
    return "CAUSAL_LM" if generates and hasattr(model, "prepare_inputs_for_generation") else None


def _lean(config: LoraConfig, base: LoraBase) -> dict[str, Any]:
    """The configuration without what PEFT 0.17 does not know and is at its default: former PEFTs warn of each such key."""
    usual = LoraConfig().to_dict()
    kept = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
        if key in KNOWN or value != usual.get(key)
    }
    kept.pop("peft_version", None)
    if config.task_type is None:
        kept["auto_mapping"] = {
            "base_model_class": "CLIPModel" if base.converted else type(base.model).__name__,
            "parent_library": "transformers" if base.converted else type(base.model).__module__,
        }
    return kept


def _targets(sites: Sequence[str], base: nn.Module, is_mixture: bool) -> list[str] | str:
    """Full paths, which every tool reads; as one anchored pattern where PEFT's suffix match would catch more."""
    suffixes = tuple(f".{site}" for site in sites)
    ambiguous = any(name.endswith(suffixes) for name, _ in base.named_modules())
    # of a mixture PEFT takes no pattern, see `as_parameters`
    return anchored(sites) if ambiguous and not is_mixture else sorted(sites)
