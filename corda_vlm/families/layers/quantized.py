"""Layers that keep their weight in fewer than sixteen bits: as a matrix, written anew, and made of a plain layer.

Known are bitsandbytes' `Linear4bit` (NF4, FP4) and `Linear8bitLt`, and an `nn.Linear` whose weight is one of torchao's tensors. All
are `nn.Linear`s, so whatever hooks or wraps those takes them as they are. Neither package is imported before such a layer is met.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.errors import CordaError
from corda_vlm.extras import require
from corda_vlm.families.layers.conv1d import conv1d_again, was_conv1d


def storage_of(layer: Any) -> str | None:
    """What a layer's weight is stored as: "nf4", "fp4", "int8", or "torchao" and the name of its tensor; None where it is a matrix.

    Also None of a storage that is not known here, see `is_readable`.
    """
    weight = getattr(layer, "weight", None)
    if weight is None or type(weight) in (Tensor, nn.Parameter):
        return None
    package, kind = type(weight).__module__.split(".")[0], type(weight).__name__
    if package == "torchao":
        return f"torchao {kind}"
    # a weight of bitsandbytes is quantised only once it is moved to a device
    if package == "bitsandbytes" and not weight.dtype.is_floating_point:
        return weight.quant_type if kind == "Params4bit" else "int8"
    return None


def is_readable(layer: nn.Linear) -> bool:
    """Is the weight a matrix of floating numbers, or stored in a way that is known here?"""
    return storage_of(layer) is not None or layer.weight.dtype.is_floating_point


def dequantized(layer: Any) -> Float[Tensor, "out inp"]:
    """The weight of a layer that `storage_of` knows, as its own forward pass takes it: a copy.

    Four bits come back in the dtype that was quantised, eight of bitsandbytes in float32.
    """
    kind, weight = storage_of(layer), layer.weight
    if kind is not None and kind.startswith("torchao"):
        return weight.detach().dequantize()
    if kind == "int8":
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else layer.state.SCB
        return weight.detach().data * (scales / 127).view(-1, 1)  # (out, inp) int8 times (out, 1)
    keep_exact(layer)
    functional = _bitsandbytes().functional
    return functional.dequantize_4bit(weight.data, _state(layer)).detach()


def quantize_again(layer: Any, matrix: Float[Tensor, "out inp"]) -> None:
    """Give a quantised layer another weight, rounded as it rounds.

    Raises:
        CordaError: a storage that cannot be written here, torchao's.
    """
    kind = storage_of(layer)
    if kind is None or kind.startswith("torchao"):
        raise CordaError(
            f"the weight of a layer that is stored as {kind} cannot be written; take base='untouched', which leaves it as it is"
        )
    device, old = layer.weight.device, layer.weight
    if kind == "int8":
        layer.weight = (
            _bitsandbytes()
            .nn.Int8Params(matrix.detach().to("cpu"), requires_grad=False, has_fp16_weights=False)
            .to(device)
        )
        layer.state.CB = layer.state.SCB = None  # taken from the weight at the next call
        return
    layer.weight = (
        _bitsandbytes()
        .nn.Params4bit(
            matrix.detach().to("cpu", _state(layer).dtype),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=layer,
        )
        .to(device)
    )


def quantize_layer(linear: nn.Linear, kind: str) -> nn.Linear:
    """A plain layer as one that keeps its weight as "nf4" (in blocks of 64, the scales quantised too, as QLoRA does) or "int8".

    Its bias is the same parameter, and what it computes in is the dtype of the plain weight.
    """
    layers, weight = _bitsandbytes().nn, linear.weight
    out, inp = weight.shape
    made: Any
    if kind == "nf4":
        made = layers.Linear4bit(
            inp, out, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
        )
        value = layers.Params4bit(
            weight.detach(), requires_grad=False, quant_type="nf4", module=made
        )
    else:
        made = layers.Linear8bitLt(
            inp, out, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        value = layers.Int8Params(weight.detach().cpu(), requires_grad=False)
    made.weight = value.to(weight.device)
    made.bias = linear.bias
    keep_exact(made)
    return made.train(linear.training)


def rounded(matrix: Float[Tensor, "out inp"], kind: str) -> Float[Tensor, "out inp"]:
    """What a plain layer with this weight multiplies by once `quantize_layer` has made it one of this kind."""
    out, inp = matrix.shape
    linear = nn.Linear(inp, out, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix.detach(), requires_grad=False)
    return dequantized(quantize_layer(linear, kind))


def plain_layer(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """The layer with its weight as a matrix of this dtype; its bias is the same parameter. A `Conv1D` comes unpacked."""
    weight = dequantized(layer).to(dtype)
    if was_conv1d(layer):
        return conv1d_again(layer, weight).train(layer.training)
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = layer.bias
    return made.train(layer.training)


BLOCK = 64
"""Weights that share a scale in four bits, by bitsandbytes' default."""


def is_misread(layer: nn.Linear, kind: str | None) -> bool:
    """Would bitsandbytes read this weight wrongly on this CPU?

    Of four bits 0.50.2 takes the scales as if blocks began anew in each row: the relative error of a normal matrix is 0.18 to 0.29
    where it should be 0.09.
    """
    cpu = layer.weight.device.type == "cpu"
    return cpu and kind in ("nf4", "fp4") and layer.in_features % BLOCK != 0 and _misreads_rows()


@lru_cache(maxsize=1)
def _misreads_rows() -> bool:
    """Tried on rows of one block and a half, of which every other block is a hundredth of those beside it."""
    functional = _bitsandbytes().functional
    blocks = torch.ones(3, BLOCK) * torch.tensor([[1.0], [0.01], [1.0]])
    weight = blocks.view(2, -1)  # (2, 96)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4")
    return bool((functional.dequantize_4bit(codes, state) - weight).abs().max() > 0.1)


def keep_exact(module: Any) -> None:
    """Keep the layers of a model from what bitsandbytes does with 4 bits on processors with AVX-512 BF16.

    At the first call without gradients it packs the weight for a faster product: its scales are rounded to bfloat16, and no later
    call gives gradients any more. Such a weight is unpacked again here.
    """
    for layer in module.modules():
        if not getattr(layer, "support_avx512bf16_for_cpu", False):
            continue
        layer.support_avx512bf16_for_cpu = False
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            unpack = _bitsandbytes().functional._convert_weight_packed_for_cpu_inverse
            layer.weight.data, layer.weight.quant_state = unpack(layer.weight.data, state)


def _state(layer: Any) -> Any:
    """What a weight of 4 bits is read by; the layer keeps it where a wrapper of parameters has lost it."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state


def _bitsandbytes() -> Any:
    return require("bitsandbytes", "quantized", "A base in four or eight bits")
