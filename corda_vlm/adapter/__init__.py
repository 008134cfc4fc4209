"""Adapters: attach a plan to a model with PEFT as the carrier, load, restore, export."""

from corda_vlm.adapter.attach import adapt, attach_adapter, load_adapter, restore, scaled
from corda_vlm.adapter.export import export_adapter

__all__ = ["adapt", "attach_adapter", "export_adapter", "load_adapter", "restore", "scaled"]
