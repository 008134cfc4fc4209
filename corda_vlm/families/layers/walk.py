"""The layers of a model under the names that they have in the bare one: what PEFT wraps around a layer is seen through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from corda_vlm.families.layers.attention import is_packed
from corda_vlm.families.layers.experts import is_stack
from corda_vlm.families.layers.matrix import matrix_of


def layers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Base name -> module of every layer, and of all that hold some, from the model itself on; of wrapped ones what is inside."""
    yield from _walk(model, "", set())


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    module = inner_layer(module)
    if id(module) in seen:  # a shared layer is one site, under its first name
        return
    seen.add(id(module))
    yield prefix, module
    if not is_packed(module) and not is_stack(module) and matrix_of(module) is None:
        for key, child in module.named_children():
            yield from _walk(child, f"{prefix}.{key}" if prefix else key, seen)


def inner_layer(module: Any, *, as_trained: bool = False) -> nn.Module:
    """The layer that a PEFT layer wraps, or the module itself.

    Args:
        as_trained: of a module that `modules_to_save` trains whole, PEFT's trained copy, not the original.
    """
    # By attribute: PEFT's tuner layers have get_base_layer, its ModulesToSaveWrapper original_module.
    if hasattr(module, "get_base_layer"):
        return module.get_base_layer()
    original = module._modules.get("original_module")
    if original is None:
        return module
    if not as_trained:
        return original
    copies, active = module.modules_to_save, module.active_adapters
    return copies[active[0]] if active and active[0] in copies else original
