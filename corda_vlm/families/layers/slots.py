"""The places of a model that hold a module, where another can be put for it."""

from __future__ import annotations

from torch import nn


def slots_of(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(dotted name, the module that holds it, its key there) of every module below `model`, a shared one as often as it is held."""
    return [
        (f"{prefix}.{key}" if prefix else key, parent, key)
        for prefix, parent in model.named_modules()
        for key, child in parent._modules.items()
        if child is not None
    ]
