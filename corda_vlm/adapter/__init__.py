"""Adapters: attach a plan to a model with PEFT as the carrier, load, scale, restore, export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.adapter.attach import attach_adapter
    from corda_vlm.adapter.exchange.export import export_adapter
    from corda_vlm.adapter.exchange.imported import import_adapter
    from corda_vlm.adapter.interpolate import at_scale, interpolated, scaled
    from corda_vlm.adapter.load import load_adapter
    from corda_vlm.adapter.one_call import adapt
    from corda_vlm.adapter.options import AttachOptions, check_scale
    from corda_vlm.adapter.quantized_base import quantize_base
    from corda_vlm.adapter.wrapped.wrap import restore

_HOMES = {
    "AttachOptions": "options",
    "adapt": "one_call",
    "at_scale": "interpolate",
    "attach_adapter": "attach",
    "check_scale": "options",
    "export_adapter": "exchange.export",
    "import_adapter": "exchange.imported",
    "interpolated": "interpolate",
    "load_adapter": "load",
    "quantize_base": "quantized_base",
    "restore": "wrapped.wrap",
    "scaled": "interpolate",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
