"""Modules that are trained in full beside an adapter: PEFT's `modules_to_save`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from corda_vlm.adapter.paired import (
    base_of,
)
from corda_vlm.errors import CordaError
from corda_vlm.sites import lies_in


def check_full_modules(model: nn.Module, names: Sequence[str], sites: Iterable[str]) -> list[str]:
    """`names`, once each is a module of its own that holds no site of the plan."""
    bare = base_of(model)
    modules = [name for name, _ in bare.named_modules()]
    for name in names:
        if name not in modules:
            raise CordaError(
                f"modules_to_save: {type(bare).__name__} has no module {name!r}; give the dotted path in full, such as "
                "'model.multi_modal_projector'"
            )
        # peft matches by suffix
        if others := [other for other in modules if other.endswith(name) and other != name]:
            raise CordaError(
                f"modules_to_save: peft would take {others[0]!r} for {name!r} as well, which ends alike"
            )
        inside = [site for site in sites if lies_in(site, [name])]
        if inside:
            raise CordaError(
                f"{inside[0]} has an adapter in the plan and would be trained in full as well, as a part of {name!r}; plan "
                "without it (towers=, roles=) or leave it out of modules_to_save"
            )
    return list(names)


def unwrap_full_modules(bare: nn.Module, adapter_name: str | None = None) -> None:
    """Put the modules that were trained in full back in place: the originals, or an adapter's trained copies."""
    for parent in list(bare.modules()):
        for key, child in list(parent._modules.items()):
            if isinstance(child, ModulesToSaveWrapper):
                copies = dict(child.modules_to_save.items())
                parent._modules[key] = copies.get(adapter_name or "", child.original_module)
