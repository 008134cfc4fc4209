"""The carrier over a parameter that is no `nn.Linear`'s: the experts of a layer in one stack, or a router.

PEFT's `ParamWrapper` (`target_parameters`) puts `W + ΔW` in the parameter's place while the module runs, whatever
implementation multiplies it. It has one rank for all experts of a stack, no dropout and no variant such as DoRA. `ΔW` is added to
the weight itself: in bfloat16 what a layer has learned rounds to the weight's precision in each step's forward, where an
adapter over an `nn.Linear` is added to the layer's outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora.layer import LoraVariant, ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from corda_vlm.adapter.paired import PairedConfig, PairedLayer, keep_a_frozen, trained
from corda_vlm.families.layers.experts import Slice, is_flipped


class PairedParameter(PairedLayer, ParamWrapper):
    """`W + scaling · (B A − B₀A₀)` in place of a parameter W, of one matrix or of one for each expert; see `PairedLayer`."""

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        config = kwargs["config"]
        assert isinstance(config, PairedConfig)
        # PEFT's layer lets no variant in, which tells the modes apart elsewhere
        self.residual = {**getattr(self, "residual", {}), adapter_name: config.base == "residual"}
        super().update_layer(adapter_name, r, *args, **kwargs)
        if config.freeze_a:
            keep_a_frozen(self, adapter_name)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        return None

    def is_residual(self, adapter_name: str) -> bool:
        return self.residual[adapter_name]

    def base_shape(self) -> tuple[int, ...]:
        return tuple(parameter_matrix(self).shape)

    def shift_base(self, P: Float[Tensor, "*n out k"], Q: Float[Tensor, "*n k inp"]) -> None:
        base = parameter_matrix(self)
        if base.dim() == 2:
            base, P, Q = base[None], P[None], Q[None]
        # one after another: all in float64 would be many times the stack
        for weight, p, q in zip(base, P, Q, strict=True):
            weight.copy_(weight.double() + p.double() @ q.double())

    def as_stored(self, matrix: Float[Tensor, "*n out inp"]) -> Float[Tensor, " *shape"]:
        return matrix.mT if _flipped(self) else matrix

    @property
    def weight_key(self) -> str:
        depth = 1
        layer: Any = self.base_layer
        while isinstance(layer, ParamWrapper):
            depth, layer = depth + 1, layer.base_layer
        return "base_layer." * depth + self.parameter_name

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Float[Tensor, " *shape"]:
        return super().get_delta_weight(adapter).to(self.get_param().dtype)

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """PEFT's name for the two factors, in the order of the parameter, whose product is added, and their scaling."""
        P, Q = self._factors(adapter_name)
        like = self.get_param()
        P, Q = P.to(like.dtype), Q.to(like.dtype)
        return (Q.mT, P.mT, 1.0) if _flipped(self) else (P, Q, 1.0)

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Scaling included; over a residual base at another scale than 1 what it lacks of the pair, too."""
        scaling = self.scaling[adapter]
        if not self.is_residual(adapter):
            P, Q = self.change(adapter)
            return (P if scaling == 1 else P * scaling), Q
        B, A = trained(self, adapter)
        if scaling == 1:
            return B, A
        B0, A0 = self.pair(adapter)
        return torch.cat([B * scaling, B0 * (1 - scaling)], dim=-1), torch.cat([A, A0], dim=-2)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add what was learned to the parameter; what it was is kept, for `unmerge`."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            parameter = self.get_param()
            self._cache_store(f"{name}-unmerged", parameter.detach().clone())
            merged = parameter.detach().float() + super().get_delta_weight(name)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                self._cache_pop(f"{name}-unmerged")
                raise ValueError(f"NaN or Inf in the merged weights of adapter {name}")
            parameter.data.copy_(merged.to(parameter.dtype))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the parameter back to the bit."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self.get_param().data.copy_(self._cache_pop(f"{name}-unmerged"))


def parameter_matrix(layer: ParamWrapper) -> Float[Tensor, "*n out inp"]:
    """The weight that is adapted, or those of all experts, as a view of the parameter."""
    weight = layer.get_param().detach()
    return weight.mT if _flipped(layer) else weight


def _flipped(layer: ParamWrapper) -> bool:
    return layer._param_ndim == 3 and is_flipped(layer.get_base_layer())


def as_peft(
    B: Float[Tensor, "n out r"], A: Float[Tensor, "n r inp"], part: Slice
) -> tuple[Float[Tensor, "o k"], Float[Tensor, "k i"]]:
    """The factors of all experts of a stack as PEFT keeps them: `lora_B` and `lora_A`, see `trained`."""
    if part.mistaken:
        B, A = A.mT, B.mT
    return B.permute(1, 2, 0).flatten(1), A.flatten(0, 1)


def from_peft(
    B: Float[Tensor, "o k"], A: Float[Tensor, "k i"], part: Slice, experts: int
) -> tuple[Float[Tensor, "n out r"], Float[Tensor, "n r inp"]]:
    """The reverse of `as_peft`."""
    first = A.unflatten(0, (experts, -1))  # (experts, r, inp)
    second = B.unflatten(1, (-1, experts)).permute(2, 0, 1)  # (experts, out, r)
    return (first.mT, second.mT) if part.mistaken else (second, first)


# PEFT tells its own class by this name where it nests a second parameter of one module, or adds a second adapter.
PairedParameter.__name__ = ParamWrapper.__name__
