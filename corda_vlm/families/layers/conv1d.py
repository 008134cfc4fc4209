"""GPT-2's `Conv1D`, shown as an `nn.Linear` while something has to see its weight.

`Conv1D` is a linear layer that keeps its weight as (in, out). PEFT has an option for it (`fan_in_fan_out`), but
everything of ours that reads a weight (bases, plans, the paired adapter, merging) would need it too. Instead it is
treated as packed attention is: `attention.unpack` puts a `TransposedLinear` in its place, whose weight is a
transposed *view* of the same storage, and `attention.pack` puts the same original module back. So there is one
path downstream, nothing is copied, and an in-place edit of the view is an edit of the original. What is exported as
a plain LoRA carries `fan_in_fan_out`, and plain PEFT loads it on the `Conv1D`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.errors import CordaError
from corda_vlm.families.layers.slots import slots_of


def is_conv1d(module: nn.Module | None) -> bool:
    """Is `module` the linear layer of transformers whose weight is (in, out)?"""
    # by name, so that this file does not import transformers for models that never use it
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.split(".")[0] == "transformers"


def linear_weight(conv: Any) -> Float[Tensor, "out inp"]:
    """The weight of a `Conv1D` as an `nn.Linear` has it: a view of the same storage."""
    return conv.weight.detach().T


class TransposedLinear(nn.Linear):
    """A `Conv1D` as an `nn.Linear`; holds the original, unregistered, to put it back."""

    packed: Any

    def __init__(self, packed: Any) -> None:
        nn.Module.__init__(self)  # nothing is allocated or initialized
        self.in_features, self.out_features = packed.weight.shape
        self.weight = nn.Parameter(linear_weight(packed), requires_grad=packed.weight.requires_grad)
        self.bias = packed.bias
        # Not a child: its parameters would be listed twice, and `.to()` would move them apart.
        self.__dict__["packed"] = packed
        self.train(packed.training)

    def forward(self, input: Float[Tensor, "*b inp"]) -> Float[Tensor, "*b out"]:
        # Conv1D's own arithmetic: outputs stay equal to the bit where F.linear would choose another kernel.
        flat = torch.addmm(self.bias, input.reshape(-1, self.in_features), self.weight.T)
        return flat.view(*input.shape[:-1], self.out_features)


def was_conv1d(layer: nn.Module) -> bool:
    """Has transformers put this quantised layer in the place of a `Conv1D`?"""
    return getattr(getattr(layer, "source_cls", None), "__name__", None) == "Conv1D"


def conv1d_again(layer: Any, weight: Float[Tensor, "out inp"]) -> TransposedLinear:
    """The `Conv1D` that a quantised layer has replaced, with this weight and the layer's bias, as `unpack_conv1d` shows it."""
    out, inp = weight.shape
    with torch.device("meta"):
        conv = layer.source_cls(out, inp)
    conv.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    conv.bias = layer.bias
    return TransposedLinear(conv)


def unpack_conv1d(model: nn.Module) -> list[str]:
    """Replace every `Conv1D` that no adapter of PEFT's own wraps, in place; return their dotted names."""
    made: dict[int, TransposedLinear] = {}
    names = []
    for name, parent, key in slots_of(model):
        conv = parent._modules[key]
        if is_conv1d(conv) and key != "base_layer":
            parent._modules[key] = made.setdefault(id(conv), TransposedLinear(conv))
            names.append(name)
    return names


def pack_conv1d(model: nn.Module, only: Sequence[str] | None) -> list[str]:
    """Undo `unpack_conv1d` for the layers of these names, None for all; return the names of those put back.

    Raises:
        CordaError: all are wanted, and an adapter is still attached to one; nothing is packed then.
    """
    found = [
        (name, parent, key)
        for name, parent, key in slots_of(model)
        if isinstance(parent._modules[key], TransposedLinear)
    ]
    if only is None and (wrapped := [name for name, _, key in found if key == "base_layer"]):
        raise CordaError(
            f"{wrapped[0].removesuffix('.base_layer')} carries an adapter: restore or export the adapter before packing"
        )
    names = []
    for name, parent, key in found:
        if key != "base_layer" and (only is None or name in only):
            layer: Any = parent._modules[key]
            parent._modules[key] = _put_back(layer)
            names.append(name)
    return names


def _put_back(layer: TransposedLinear) -> nn.Module:
    """The original, with the values, gradients and `requires_grad` of the view."""
    packed, value = layer.packed, layer.weight.detach().T
    whole = packed.weight
    if value.device.type != whole.device.type:
        whole = packed.weight = nn.Parameter(value.contiguous())  # cannot change its kind in place
    elif value.dtype != whole.dtype or value.device != whole.device:
        whole.data = value.contiguous()
    elif value.data_ptr() != whole.data_ptr() or value.stride() != whole.stride():
        whole.data.copy_(value)
    whole.requires_grad_(layer.weight.requires_grad)
    if layer.weight.grad is not None:
        whole.grad = layer.weight.grad.T
    packed.bias = layer.bias
    packed.train(layer.training)
    return packed
