"""The weight of a layer as a matrix, whatever it is stored as."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from corda_vlm.errors import NoSitesError
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.layers.matrix import matrix_of, write_matrix
from corda_vlm.sites import find_sites, get_linear, site_weights


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 4)  # (out, inp), stored as (inp, out)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), conv1d])
def test_a_layer_gives_the_matrix_that_multiplies_its_tokens_and_takes_another(make):
    layer, x = make(), torch.randn(3, 4)
    matrix = matrix_of(layer)
    assert matrix is not None
    assert matrix.shape == (6, 4)
    torch.testing.assert_close(layer(x), x @ matrix.read().T + layer.bias)
    assert matrix.read().untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
    value, before = torch.randn(6, 4), layer.weight
    write_matrix(layer, value)
    assert layer.weight is before
    torch.testing.assert_close(matrix.read(), value, rtol=0, atol=0)


def test_other_modules_have_none():
    assert matrix_of(nn.LayerNorm(3)) is None


def test_weights_of_sites_are_read_when_they_are_looked_up(tiny_open_clip):
    names = [site.name for site in find_sites(tiny_open_clip)]
    weights = site_weights(tiny_open_clip, names)
    assert list(weights) == names
    assert len(weights) == len(names)
    with unpacked(tiny_open_clip):
        for name, weight in weights.items():
            there = get_linear(tiny_open_clip, name).weight
            torch.testing.assert_close(weight, there.detach(), rtol=0, atol=0)
            assert weights.shapes[name] == tuple(there.shape)
    with pytest.raises(NoSitesError, match=r"has no layer 'no\.such'"):
        site_weights(tiny_open_clip, ["no.such"])
