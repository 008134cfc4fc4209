"""A copy of a model with its adapter taken off or merged, which shares all other tensors with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from corda_vlm.adapter.paired import PairedLayer, base_of
from corda_vlm.adapter.wrapped.full_modules import unwrap_full_modules
from corda_vlm.errors import CordaError
from corda_vlm.families.layers.attention import pack
from corda_vlm.families.loading.quantization import dequantize_model


def twin_of(
    model: PeftModel, change: Callable[[LoraLayer], None], modules_of: str | None = None
) -> nn.Module:
    """The bare, packed model with `change` made to each adapted layer, sharing every other tensor with `model`.

    Modules that were trained in full are the originals, or those of the adapter named by `modules_of`.

    So an export takes the memory of the adapted weights, not of the model, and cannot touch the original.
    """
    base = base_of(model)
    private: set[int] = set()
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            private |= {id(p) for p in module.parameters()}
        packed = module.__dict__.get("packed")  # `attention.pack` writes into these
        if isinstance(packed, nn.Module):
            private |= {id(p) for p in packed.parameters()}
    tensors = [*base.parameters(), *base.buffers()]
    twin = copy.deepcopy(base, {id(t): t for t in tensors if id(t) not in private})
    with torch.no_grad():
        if change is not original:  # what is written anew is written in sixteen bits
            dequantize_model(twin)
        for parent in list(twin.modules()):
            for key, child in list(parent._modules.items()):
                if isinstance(child, LoraLayer):
                    if child.merged:
                        child.unmerge()
                    change(child)
                    parent._modules[key] = child.get_base_layer()
    twin.__dict__.pop("peft_config", None)
    unwrap_full_modules(twin, modules_of)
    pack(twin)
    return twin


def with_change(layer: LoraLayer) -> None:
    try:
        if type(layer).__module__.rpartition(".")[2] in ("bnb", "torchao"):
            _merge_of_quantized(layer)
        else:
            layer.merge(safe_merge=True)  # pyright: ignore[reportAttributeAccessIssue]
    except CordaError:  # is a ValueError too
        raise
    except ValueError as error:
        raise CordaError(
            "a merged weight holds NaN or Inf: the base model is damaged, or its precision too low for what was learned; "
            "load it again, in float32"
        ) from error


def _merge_of_quantized(layer: Any) -> None:
    """Merge what PEFT's own layers of quantised bases have learned into the matrix that the twin has instead."""
    weight = layer.get_base_layer().weight
    for name in layer.active_adapters:
        if name in layer.lora_variant:
            kind = type(layer.lora_variant[name]).__name__
            raise CordaError(
                f"{kind} on a quantised base is no plain LoRA and cannot be merged here; load its adapter on the original weights "
                "with peft, and merge it there"
            )
        merged = weight.float() + layer.get_delta_weight(name).float()
        if not bool(torch.isfinite(merged).all()):
            raise ValueError("NaN or Inf")
        weight.data.copy_(merged)


def original(layer: LoraLayer) -> None:
    if isinstance(layer, PairedLayer):
        for name in list(layer.lora_init_A):
            layer.drop_pair(name)


def less_pair(layer: LoraLayer) -> None:
    assert isinstance(layer, PairedLayer)
    name = layer.active_adapters[0]
    if not layer.is_residual(name):
        B0, A0 = layer.pair(name)
        layer.shift_base(-B0, A0)
