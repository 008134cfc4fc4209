"""The weight of a layer as a matrix (out, inp) that multiplies tokens, whatever it is stored as.

Everything above this file (sites, fingerprints, bases, plans, the paired adapter) asks here, and so knows of no storage. A further
kind of layer is one more branch of `matrix_of` and of `write_matrix`, or, where one module holds several matrices, parts that
`sites` walks through as it does through packed attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.distributed.pieces import whole
from corda_vlm.errors import CordaError
from corda_vlm.families.layers.conv1d import is_conv1d, linear_weight
from corda_vlm.families.layers.conv2d import as_kernel, conv_matrix, is_conv2d
from corda_vlm.families.layers.quantized import dequantized, quantize_again, storage_of


@dataclass(frozen=True)
class Matrix:
    """A weight that has not been read yet: what is stored otherwise takes its size in memory only once it is.

    Attributes:
        shape: (out, inp).
        read: the weight, detached: a view of the storage where that is a matrix, else a copy.
        kernel: height and width of a convolution's patches; None of what multiplies tokens.
    """

    shape: tuple[int, int]
    read: Callable[[], Float[Tensor, "out inp"]]
    kernel: tuple[int, int] | None = None


def stored(weight: Float[Tensor, "out inp"]) -> Matrix:
    """A weight that is stored as the matrix that it is; gathered where each process holds a piece of it."""
    out, inp = weight.shape
    return Matrix((out, inp), lambda: whole(_in_memory(weight.detach())))


def _in_memory(weight: Float[Tensor, "out inp"]) -> Float[Tensor, "out inp"]:
    if weight.device.type == "meta":
        out, inp = weight.shape
        raise CordaError(
            f"a weight of {out}×{inp} is not in memory: it is on the device 'meta'. Load the weights before; experts and packed "
            "attention are not read where accelerate offloads them: give device_map the devices that hold them"
        )
    return weight


def _linear(layer: nn.Linear) -> Matrix:
    """A linear layer's, read from where it rests where accelerate moves it in for the time of a call alone."""
    if layer.weight.device.type != "meta":
        return stored(layer.weight)
    out, inp = layer.weight.shape
    return Matrix((out, inp), lambda: _at_rest(layer))


def _at_rest(layer: nn.Linear) -> Float[Tensor, "out inp"]:
    hook: Any = getattr(layer, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    maps = [found for one in hooks if (found := getattr(one, "weights_map", None)) is not None]
    if not maps:
        raise CordaError(
            f"a weight of {layer.out_features}×{layer.in_features} is not in memory: it is on the device 'meta'. Load the weights "
            "before, or dispatch the model with accelerate, whose offloaded weights are read from where they rest"
        )
    return maps[0]["weight"].detach()


def matrix_of(layer: Any) -> Matrix | None:
    """The weight of a bare layer; None of a module that is no layer with one matrix."""
    if is_conv1d(layer):
        return stored(linear_weight(layer))
    if isinstance(layer, nn.Linear):
        if storage_of(layer) is not None:
            shape = (layer.out_features, layer.in_features)
            return Matrix(shape, lambda: dequantized(layer))
        return _linear(layer)
    if is_conv2d(layer):
        out, channels, height, width = layer.weight.shape
        shape = out, channels * height * width
        return Matrix(shape, lambda: conv_matrix(layer).detach(), (height, width))
    return None


def shape_of(layer: Any) -> tuple[int, int]:
    """(out, inp) of a layer that `matrix_of` knows."""
    matrix = matrix_of(layer)
    assert matrix is not None
    return matrix.shape


def write_matrix(layer: Any, matrix: Float[Tensor, "out inp"]) -> None:
    """Give a layer that `matrix_of` knows these values, rounded to what it is stored as.

    In place: the weight of an unpacked attention is a view of the packed storage.
    """
    if storage_of(layer) is not None:
        quantize_again(layer, matrix)
        return
    weight = linear_weight(layer) if is_conv1d(layer) else layer.weight.data
    weight.copy_(as_kernel(layer, matrix) if is_conv2d(layer) else matrix)
