"""Adapters: attach a plan to a model with PEFT as the carrier, load, scale, restore, export."""

from corda_vlm.adapter.attach import adapt, attach_adapter, load_adapter, restore
from corda_vlm.adapter.export import export_adapter
from corda_vlm.adapter.interpolate import at_scale, check_scale, interpolated, scaled

__all__ = [
    "adapt",
    "at_scale",
    "attach_adapter",
    "check_scale",
    "export_adapter",
    "interpolated",
    "load_adapter",
    "restore",
    "scaled",
]
