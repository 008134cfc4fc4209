"""Layers that keep their weight in fewer than sixteen bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from corda_vlm.errors import CordaError
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.layers.matrix import matrix_of, write_matrix
from corda_vlm.families.layers.quantized import (
    is_misread,
    is_readable,
    keep_exact,
    plain_layer,
    quantize_layer,
    storage_of,
)


@pytest.fixture
def linear():
    return nn.Linear(128, 64)


@pytest.fixture(params=["nf4", "int8"])
def layer(request, linear):
    pytest.importorskip("bitsandbytes", reason="the extra corda-vlm[quantized] is not installed")
    return quantize_layer(linear, request.param)


def test_the_matrix_is_what_the_layer_multiplies_by(linear, layer):
    matrix: Any = matrix_of(layer)
    assert matrix.shape == (64, 128)
    weight = matrix.read()
    x = torch.randn(5, 128)
    # of eight bits: as it computes in training, where it does not round its inputs
    torch.testing.assert_close(layer.train()(x), x @ weight.T + linear.bias)
    error = float((weight - linear.weight.detach()).norm() / linear.weight.detach().norm())
    assert 0.001 < error < {"nf4": 0.12, "int8": 0.01}[str(storage_of(layer))]
    assert layer.bias is linear.bias


def test_reading_does_not_change_with_use(layer):
    matrix: Any = matrix_of(layer)
    before = matrix.read()
    layer.train()(torch.randn(5, 128)).sum().backward()
    with torch.no_grad():
        layer.eval()(torch.randn(5, 128))
    assert torch.equal(matrix.read(), before)


def test_another_weight_is_rounded_as_the_layer_rounds(layer):
    other = nn.Linear(128, 64)
    write_matrix(layer, other.weight.detach())
    there: Any = matrix_of(layer)
    expected: Any = matrix_of(quantize_layer(other, str(storage_of(layer))))
    torch.testing.assert_close(there.read(), expected.read(), rtol=0, atol=1e-6)
    x = torch.randn(5, 128)
    torch.testing.assert_close(layer.train()(x), x @ there.read().T + layer.bias)


def test_a_plain_layer_of_it(layer):
    plain = plain_layer(layer, torch.bfloat16)
    assert storage_of(plain) is None
    assert plain.weight.dtype == torch.bfloat16
    there: Any = matrix_of(layer)
    assert torch.equal(plain.weight, there.read().bfloat16())
    assert plain.bias is layer.bias


def test_four_bits_go_on_giving_gradients_after_a_call_without(linear):
    """bitsandbytes packs such a layer for inference on processors with AVX-512 BF16, and never unpacks it."""
    bnb = pytest.importorskip("bitsandbytes")
    loaded = bnb.nn.Linear4bit(128, 64, quant_type="nf4")  # as a library makes one
    loaded.load_state_dict(linear.state_dict())
    model = nn.Sequential(loaded.to("cpu")).eval()
    expected: Any = matrix_of(quantize_layer(linear, "nf4"))
    x = torch.randn(5, 128)
    with torch.no_grad():
        model(x)
    with unpacked(model):
        model(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    there: Any = matrix_of(model[0])
    # it may have been packed, which rounds the scales to bfloat16
    torch.testing.assert_close(there.read(), expected.read(), rtol=2**-8, atol=0)
    keep_exact(model)


def test_torchao_is_read_and_not_written(linear):
    torchao = pytest.importorskip("torchao.quantization")
    weight = linear.weight.detach().clone()
    torchao.quantize_(nn.Sequential(linear), torchao.Int8WeightOnlyConfig())
    assert storage_of(linear) == "torchao Int8Tensor"
    assert is_readable(linear)
    there: Any = matrix_of(linear)
    torch.testing.assert_close(there.read(), weight, rtol=0, atol=1e-3)
    with pytest.raises(CordaError, match=r"torchao Int8Tensor cannot be written.*untouched"):
        write_matrix(linear, weight)


def test_a_storage_that_is_not_known(linear):
    linear.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert storage_of(linear) is None
    assert not is_readable(linear)


def test_rows_that_are_misread_on_a_cpu():
    pytest.importorskip("bitsandbytes")
    odd = nn.Linear(96, 64)
    odd.weight.data.normal_()
    assert not is_misread(odd, "int8")
    assert not is_misread(nn.Linear(128, 64), "nf4")
    there: Any = matrix_of(quantize_layer(odd, "nf4"))
    error = (there.read() - odd.weight.detach()).norm() / odd.weight.detach().norm()
    assert (float(error) > 0.12) == is_misread(odd, "nf4")
