"""The carrier: a PEFT LoRA layer that remembers the frozen pair it started from.

PEFT's own CorDA and PiSSA write `W₀ = W − B₀A₀` into the base model and forget the pair. Here every layer
keeps `A₀`, `B₀` as buffers beside the trained `A`, `B`, in one of two modes:

- "untouched": the base weight stays `W`, to the bit; the layer adds `(B A − B₀A₀) x`. It is computed as
  `(B − B₀) A x + B₀ (A − A₀) x`: exactly zero at the start in any precision, and rounding is relative to
  what was learned, where the difference of two large products would drown it in bfloat16.
- "residual": the base weight is `W₀`, the layer adds `B A x` as plain LoRA does. In bfloat16 `W₀` is `W − B₀A₀`
  rounded, up to half a unit of every weight. The layer holds `W = W₀ + B₀A₀` true whenever a pair is set or loaded.

A checkpoint carries the peft type "CORDA_VLM", which a PEFT without this package does not know: plain
`PeftModel.from_pretrained` stops with `KeyError: 'CORDA_VLM'` where it would be silently wrong (as a
LoRA it lacks `−B₀A₀`). Once this module is imported it loads right there too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as TUNERS
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer, LoraVariant, ParamWrapper
from peft.tuners.lora.model import LoraModel
from torch import Tensor, nn

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families.base import frozen_norms
from corda_vlm.families.layers.attention import pack
from corda_vlm.families.layers.conv2d import as_kernel, convolved
from corda_vlm.families.layers.experts import is_mistaken
from corda_vlm.families.layers.matrix import Matrix, matrix_of, write_matrix
from corda_vlm.families.layers.quantized import storage_of

BASES = ("untouched", "residual")


class PairedType(str, Enum):
    """The peft type in `adapter_config.json`; a str enum as PEFT's own."""

    CORDA_VLM = "CORDA_VLM"


@dataclass
class PairedConfig(LoraConfig):
    """PEFT's `LoraConfig` and what a paired layer needs.

    Attributes:
        base: "untouched" or "residual", see the module.
        freeze_a: A stays at A₀ and only B is trained.
        origin: where the pair came from, readable: method, mode, family, model_fingerprint, data_fingerprint.
        quantization: what a residual base was quantised to once the pair was taken out of it, see `quantized_base`; else None.
    """

    base: str = "untouched"
    freeze_a: bool = False
    origin: dict[str, Any] = field(default_factory=dict)
    quantization: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base not in BASES:
            raise UnknownNameError("base mode", self.base, BASES)
        self.peft_type = PairedType.CORDA_VLM  # pyright: ignore[reportAttributeAccessIssue]
        self._register_custom_module({nn.Linear: PairedLinear, nn.Conv2d: PairedConv2d})


class PairedLayer(nn.Module, LoraLayer):
    """`y = W x + scaling · (B A − B₀A₀) x`, see the module; PEFT's class for a kind of layer comes after it.

    `scaling` is 1 unless PEFT's `set_scale` changes it; in both modes it interpolates between the original
    layer (0) and the trained one (1).
    """

    other_param_names = (*LoraLayer.other_param_names, "lora_init_A", "lora_init_B")

    def update_layer(self, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        if "lora_init_A" not in self._modules:  # PEFT's constructor comes here before it returns
            self.lora_init_A = BufferDict(persistent=True)
            self.lora_init_B = BufferDict(persistent=True)
        *experts, out, inp = self.base_shape()
        self.lora_init_A[adapter_name] = torch.zeros(*experts, r, inp)
        self.lora_init_B[adapter_name] = torch.zeros(*experts, out, r)
        super().update_layer(adapter_name, r, *args, **kwargs)

    def base_shape(self) -> tuple[int, ...]:
        """(out, inp) of the base weight, or (experts, out, inp)."""
        return base_matrix(self).shape

    def shift_base(self, P: Float[Tensor, "*n out k"], Q: Float[Tensor, "*n k inp"]) -> None:
        """Add `P Q` to the base weight, in float64."""
        weight = base_matrix(self).read().double()
        write_matrix(self.get_base_layer(), weight + P.double() @ Q.double())

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        assert isinstance(config, PairedConfig)  # `PairedModel` lets no other in
        return Untouched() if config.base == "untouched" else Residual()

    def product(
        self, x: Float[Tensor, "*read"], B: Float[Tensor, "out r"], A: Float[Tensor, "r inp"]
    ) -> Float[Tensor, "*given"]:
        """`B A x`, without their product."""
        return F.linear(F.linear(x, A), B)

    def is_residual(self, adapter_name: str) -> bool:
        return isinstance(self.lora_variant[adapter_name], Residual)

    def a_is_frozen(self, adapter_name: str) -> bool:
        return a_of(self) in self.frozen_peft_weight_names.get(adapter_name, ())

    def pair(
        self, adapter_name: str
    ) -> tuple[Float[Tensor, "*n out r"], Float[Tensor, "*n r inp"]]:
        """The frozen `B₀`, `A₀`."""
        B, A = self.lora_init_B[adapter_name], self.lora_init_A[adapter_name]
        assert B is not None
        assert A is not None
        return B, A

    def set_pair(
        self, adapter_name: str, B: Float[Tensor, "*n out r"], A: Float[Tensor, "*n r inp"]
    ) -> None:
        """Make `B`, `A` the frozen pair, and in residual mode the base weight `W − B A`.

        Raises:
            CordaError: the adapter is merged, or the pair has the wrong shape.
        """
        old_B, old_A = self.pair(adapter_name)
        if A.shape != old_A.shape or B.shape != old_B.shape:
            raise CordaError(
                f"a pair of shapes {tuple(B.shape)}, {tuple(A.shape)} does not fit an adapter of shapes "
                f"{tuple(old_B.shape)}, {tuple(old_A.shape)}; it was made for another plan"
            )
        if self.merged:
            raise CordaError("the adapter is merged into the base; call `unmerge_adapter()` first")
        A, B = A.detach().to(old_A), B.detach().to(old_B)
        if torch.equal(A, old_A) and torch.equal(B, old_B):
            return  # nothing to shift, so nothing to round
        if self.is_residual(adapter_name):
            self.shift_base(torch.cat([old_B, -B], dim=-1), torch.cat([old_A, A], dim=-2))
        self.lora_init_A[adapter_name], self.lora_init_B[adapter_name] = A.clone(), B.clone()

    def drop_pair(self, adapter_name: str) -> None:
        """Forget the pair; in residual mode the base weight is `W` again, up to rounding."""
        B0, A0 = self.pair(adapter_name)
        self.set_pair(adapter_name, torch.zeros_like(B0), torch.zeros_like(A0))

    def change(
        self, adapter_name: str
    ) -> tuple[Float[Tensor, "*n out k"], Float[Tensor, "*n k inp"]]:
        """What was learned, as factors `P Q = B A − B₀A₀`, without scaling and without a full matrix.

        `P = [B − B₀, B₀]`, `Q = [A; A − A₀]` (k = 2r): the same product as `[B, −B₀] [A; A₀]`, but rounding
        either to a lower precision costs a share of the change, not of the two large products. With A
        frozen the second half is zero and left out (k = r).
        """
        (B, A), (B0, A0) = trained(self, adapter_name), self.pair(adapter_name)
        if self.a_is_frozen(adapter_name):
            return B - B0, A
        return difference(B, A, B0, A0)

    def get_delta_weight(self, adapter: str) -> Float[Tensor, " *shape"]:
        """What merging adds to the base weight, in float32 or better; PEFT's name for it."""
        P, Q = self.change(adapter)
        delta = P.float() @ Q.float() * self.scaling[adapter]
        if self.is_residual(adapter):
            B0, A0 = self.pair(adapter)
            delta = delta + B0.float() @ A0.float()
        return self.as_stored(delta)

    def as_stored(self, matrix: Float[Tensor, "*n out inp"]) -> Float[Tensor, " *shape"]:
        """A matrix, or one for each expert, in the shape of the layer's weight."""
        return matrix

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's; a quantised weight is refused.

        Raises:
            CordaError: the base is quantised: rounding to its few values would take most of what was learned.
        """
        kind = storage_of(self.get_base_layer())
        if kind is not None and not self.merged:
            raise CordaError(
                f"the base is stored as {kind}, and merged into that most of what was learned would be rounded away; "
                "export_adapter(..., format='merged') writes the merged model in sixteen bits"
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    @property
    def weight_key(self) -> str:
        """Where in a `state_dict` the base weight is, within the layer."""
        return "base_layer.weight"

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.lora_init_A:
            self.drop_pair(adapter_name)
        super().delete_adapter(adapter_name)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A checkpoint brings its pair; a residual base has to follow, unless its weight comes along.
        for name in self.lora_init_A:
            A = state_dict.get(f"{prefix}lora_init_A.{name}")
            B = state_dict.get(f"{prefix}lora_init_B.{name}")
            if A is not None and B is not None and f"{prefix}{self.weight_key}" not in state_dict:
                self.set_pair(name, B, A)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class PairedLinear(PairedLayer, Linear):
    """The carrier over an `nn.Linear`."""


class PairedConv2d(PairedLayer, Conv2d):
    """The carrier over an `nn.Conv2d`: as PEFT's, A is a k×k convolution to r channels and B a 1×1 one from there.

    What is learned is computed by two such convolutions too, with the stride, the padding and its mode, and the dilation of the layer:
    its patches are never made. PEFT's own know no dilation and no mode of padding.
    """

    def product(
        self, x: Float[Tensor, "*read"], B: Float[Tensor, "out r"], A: Float[Tensor, "r inp"]
    ) -> Float[Tensor, "*given"]:
        return convolved(self._conv(), x, A, B)

    def as_stored(self, matrix: Float[Tensor, "out inp"]) -> Float[Tensor, " *shape"]:
        return as_kernel(self._conv(), matrix)

    def _conv(self) -> nn.Conv2d:
        conv = self.get_base_layer()
        assert isinstance(conv, nn.Conv2d)
        return conv


class Untouched(LoraVariant):
    """Forward and merge over the original weight `W`."""

    @staticmethod
    def init(
        module: LoraLayer, adapter_name: str, config: PairedConfig | None = None, **kwargs: Any
    ) -> None:
        assert config is not None
        if config.freeze_a:
            keep_a_frozen(module, adapter_name)

    @staticmethod
    def forward(
        module: LoraLayer,
        active_adapter: str,
        x: Float[Tensor, "*read"],
        result: Float[Tensor, "*given"],
        **kwargs: Any,
    ) -> Float[Tensor, "*given"]:
        assert isinstance(module, PairedLayer)
        P, Q = module.change(active_adapter)
        # the small factor is scaled, not the outputs: a pass over them less, forward and backward
        return result + module.product(x, P * module.scaling[active_adapter], Q)

    @staticmethod
    def merge_safe(
        module: LoraLayer, active_adapter: str, orig_weight: Float[Tensor, " out *inp"]
    ) -> Float[Tensor, " out *inp"]:
        assert isinstance(module, PairedLayer)
        # PEFT's unmerge subtracts and rounds; this one puts the weight back to the bit, for its size in memory.
        module._cache_store(f"{active_adapter}-unmerged", orig_weight.detach().clone())
        merged = orig_weight.float() + module.get_delta_weight(active_adapter)
        return merged.to(orig_weight.dtype)

    @classmethod
    def merge_unsafe(  # pyright: ignore[reportIncompatibleMethodOverride] - one for both variants
        cls, module: LoraLayer, active_adapter: str, orig_weight: Float[Tensor, " out *inp"]
    ) -> None:
        orig_weight.data.copy_(cls.merge_safe(module, active_adapter, orig_weight.data))

    @staticmethod
    def unmerge(
        module: LoraLayer, active_adapter: str, orig_weight: Float[Tensor, " out *inp"]
    ) -> Float[Tensor, " out *inp"]:
        before = module._cache_pop(f"{active_adapter}-unmerged")
        return orig_weight.data.copy_(before)


class Residual(Untouched):
    """Forward over `W₀`; merging and unmerging as above, the weight in between being `W₀`."""

    @staticmethod
    def forward(
        module: LoraLayer,
        active_adapter: str,
        x: Float[Tensor, "*read"],
        result: Float[Tensor, "*given"],
        **kwargs: Any,
    ) -> Float[Tensor, "*given"]:
        assert isinstance(module, PairedLayer)
        B, A = trained(module, active_adapter)
        scaling = module.scaling[active_adapter]
        result = result + module.product(x, B * scaling, A)
        if scaling == 1:
            return result
        B0, A0 = module.pair(active_adapter)
        return result + module.product(x, B0 * (1 - scaling), A0)


class PairedModel(LoraModel):
    """PEFT's LoRA tuner, with what would silently go wrong for pairs refused or put right."""

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        if not isinstance(config, PairedConfig):
            raise CordaError(
                f"a {type(config).__name__} adapter cannot join adapters of corda_vlm in one model; "
                "export this one with export_adapter(..., format='lora') and load both with PEFT"
            )
        refuse_second_residual([c.base for c in self.peft_config.values()])  # pyright: ignore[reportAttributeAccessIssue]

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        lora_config: LoraConfig,
        adapter_name: str,
        target: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, *args, **kwargs)
        # An adapter that is added under another's own configuration is made for a copy of its A and B, as TRL's DPOTrainer
        # makes its reference: without the pair it would not be the model that it copies.
        same = [n for n, c in self.peft_config.items() if c is lora_config and n != adapter_name]
        if same and isinstance(target, PairedLayer) and same[0] in target.lora_init_A:
            target.set_pair(adapter_name, *target.pair(same[0]))

    @staticmethod
    def _create_new_module(
        lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        if kwargs.get("parameter_name") is None:
            return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        from corda_vlm.adapter.wrapped.parameters import PairedParameter

        return PairedParameter(target, adapter_name, config=lora_config, **kwargs)

    def train(self, mode: bool = True) -> PairedModel:
        """As of any module, but what is frozen of the model stays as it is, running statistics too."""
        super().train(mode)
        for norm in frozen_norms(self.model):
            norm.eval()
        return self

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise CordaError(
            "PEFT would combine A and B without the frozen pair; export each adapter with "
            "export_adapter(..., format='lora') and combine those"
        )

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not merge:
            for layer in paired_layers(self.model).values():
                if layer.merged:
                    layer.unmerge()
                for name in list(layer.lora_init_A):
                    layer.drop_pair(name)
        super()._unload_and_optionally_merge(merge=merge, **kwargs)
        pack(self.model)
        return self.model


def trained(
    layer: LoraLayer, adapter_name: str
) -> tuple[Float[Tensor, "*n out r"], Float[Tensor, "*n r inp"]]:
    """The parameters `B`, `A` of one adapter of any LoRA layer over an `nn.Linear` or `nn.Conv2d`, as matrices.

    Of a layer over the experts of a mixture they are stacks of matrices. PEFT keeps those in two matrices: `lora_A` lists
    each expert's rows, `lora_B` each row's experts. Through them a gradient reaches the parameters; `start_from` writes to those.
    """
    B, A = layer.lora_B[adapter_name], layer.lora_A[adapter_name]
    assert isinstance(B, (nn.Linear, nn.Conv2d))
    assert isinstance(A, (nn.Linear, nn.Conv2d))
    if not isinstance(layer, ParamWrapper) or layer._param_ndim == 2:
        return B.weight.flatten(1), A.weight.flatten(1)
    first = A.weight.unflatten(0, (layer.num_experts, -1))  # (experts, r, inp)
    second = B.weight.unflatten(1, (-1, layer.num_experts)).permute(2, 0, 1)  # (experts, out, r)
    return (first.mT, second.mT) if takes_out_for_in(layer) else (second, first)


def takes_out_for_in(layer: LoraLayer) -> bool:
    """Whether PEFT takes a stack's (in, out) for (out, in), as it does Llama 4's: its `lora_A` is then our B, transposed."""
    if not isinstance(layer, ParamWrapper) or layer._param_ndim == 2:
        return False
    return is_mistaken(layer.get_base_layer())


def a_of(layer: LoraLayer) -> str:
    """PEFT's name for what A is."""
    return "lora_B" if takes_out_for_in(layer) else "lora_A"


@torch.no_grad()
def start_from(
    layer: LoraLayer, adapter_name: str, B: Float[Tensor, "*n out r"], A: Float[Tensor, "*n r inp"]
) -> None:
    """Give one adapter of a LoRA layer these parameters."""
    if isinstance(layer, ParamWrapper):
        for view, value in zip(trained(layer, adapter_name), (B, A), strict=True):
            view.copy_(value)
        return
    write_matrix(layer.lora_B[adapter_name], B)
    write_matrix(layer.lora_A[adapter_name], A)


def difference(
    B: Float[Tensor, "*n out r"],
    A: Float[Tensor, "*n r inp"],
    B0: Float[Tensor, "*n out r"],
    A0: Float[Tensor, "*n r inp"],
) -> tuple[Float[Tensor, "*n out k"], Float[Tensor, "*n k inp"]]:
    """Factors `P Q = B A − B₀A₀` as in `PairedLayer.change`, of one layer or of many equal ones."""
    return torch.cat([B - B0, B0], dim=-1), torch.cat([A, A - A0], dim=-2)


def base_matrix(layer: LoraLayer) -> Matrix:
    """The weight (out, inp) of the layer that a LoRA layer wraps, whatever it is stored as."""
    matrix = matrix_of(layer.get_base_layer())
    assert matrix is not None
    return matrix


def keep_a_frozen(layer: LoraLayer, adapter_name: str) -> None:
    """Keep A out of training, also after `set_adapter`, `disable_adapter` and a resumed checkpoint."""
    # rebound, not changed in place: PEFT declares the dict on the class
    layer.frozen_peft_weight_names = {
        **layer.frozen_peft_weight_names,
        adapter_name: (a_of(layer),),
    }
    layer._freeze_non_trainable_peft_weights(adapter_name)


def paired_layers(model: nn.Module) -> dict[str, PairedLayer]:
    """Name in the wrapped model -> layer, in the model's order; one for all experts of a matrix."""
    return {n: m for n, m in base_of(model).named_modules() if isinstance(m, PairedLayer)}


def base_of(model: nn.Module) -> nn.Module:
    """The model that a `PeftModel` wraps, or the model itself."""
    # not `get_base_model()`, which asks for the configuration of an adapter that may be deleted
    return cast(nn.Module, model.base_model.model) if isinstance(model, PeftModel) else model


def refuse_second_residual(bases: list[str]) -> None:
    """Raise if adapters of these base modes cannot live on one model."""
    if len(bases) > 1 and "residual" in bases:
        raise CordaError(
            "a residual base W − B₀A₀ belongs to one adapter; attach every adapter with base='untouched'"
        )


def refuse_residual_of_quantized(base: str) -> None:
    """Raise if this base mode cannot be of a model that is quantised already."""
    if base == "residual":
        raise CordaError(
            "the residual W − B₀A₀ of a base that is quantised already would be rounded twice; load the original weights, attach "
            "(or load) the adapter with base='residual', and quantise then: quantize_base(peft_model, 'nf4'). Or take "
            "base='untouched', which leaves the quantised base as it is"
        )


PEFT_TYPE_TO_CONFIG_MAPPING[PairedType.CORDA_VLM] = PairedConfig  # pyright: ignore[reportArgumentType]
PEFT_TYPE_TO_PREFIX_MAPPING[PairedType.CORDA_VLM] = "lora_"  # pyright: ignore[reportArgumentType]
TUNERS[PairedType.CORDA_VLM] = PairedModel  # pyright: ignore[reportArgumentType]
