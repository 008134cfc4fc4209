"""Which layer of PEFT's carries the adapter of which site: one each, or one for all experts of a matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from corda_vlm.adapter.paired import base_of


@dataclass(frozen=True)
class Carrier:
    """A LoRA layer, and the sites that it adapts.

    Attributes:
        sites: one, or one for each expert, in order.
        stacked: its factors have a first axis of experts.
    """

    layer: LoraLayer
    sites: tuple[str, ...]
    stacked: bool = False

    def split(
        self, B: Float[Tensor, "*n out r"], A: Float[Tensor, "*n r inp"]
    ) -> dict[str, tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"]]]:
        """Site -> its part of factors of this layer."""
        if not self.stacked:
            return {self.sites[0]: (B, A)}
        return {site: (B[n], A[n]) for n, site in enumerate(self.sites)}

    def joined(
        self, pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Float[Tensor, "*n out r"], Float[Tensor, "*n r inp"]]:
        """The reverse of `split`: the factors of this layer, of those of its sites in order."""
        if not self.stacked:
            return pairs[0]
        return torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])


def carriers(model: nn.Module, adapter_name: str | None = None) -> Iterator[Carrier]:
    """Those of a model that have this adapter, None for any."""
    for name, layer in base_of(model).named_modules():
        if isinstance(layer, LoraLayer) and (adapter_name is None or adapter_name in layer.r):
            yield carrier_of(name, layer)


def carrier_of(name: str, layer: LoraLayer) -> Carrier:
    """The carrier that a layer is, under its name in the wrapped model."""
    if not isinstance(layer, ParamWrapper):
        return Carrier(layer, (name,))
    path = name
    while path.endswith(".base_layer"):  # a parameter within another's wrapper
        path = path.removesuffix(".base_layer")
    if layer._param_ndim == 2:
        return Carrier(layer, (path,))
    sites = tuple(f"{path}.{layer.parameter_name}.{n}" for n in range(layer.num_experts))
    return Carrier(layer, sites, stacked=True)
