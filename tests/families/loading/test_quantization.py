"""Models in four and eight bits: loaded so, and made in memory."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from corda_vlm import find_sites, load_model
from corda_vlm.errors import CordaError
from corda_vlm.families.layers.quantized import is_misread, storage_of
from corda_vlm.families.loading.quantization import dequantize_model, quantize_model
from corda_vlm.same_model import is_quantized
from corda_vlm.sites import get_linear, model_fingerprint
from tests.families import moe_toy
from tests.families.language_toy import make
from tests.quantized_toy import OF_BITSANDBYTES, batches, dense, quantized

pytest.importorskip("bitsandbytes", reason="the extra corda-vlm[quantized] is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    dense().save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", OF_BITSANDBYTES)
def test_a_folder_is_loaded_so(folder, kind):
    model: Any = load_model(folder, quantization=kind, dtype="bfloat16").model
    names = [site.name for site in find_sites(model)]
    assert names == [site.name for site in find_sites(dense())]
    assert {storage_of(get_linear(model, name)) for name in names} == {kind}
    assert storage_of(model.lm_head) is None
    assert model.model.norm.weight.dtype == torch.bfloat16
    # the same as the one that is quantised in memory, and of the size that it should have
    made = quantized(kind, load_model(folder, dtype="bfloat16").model)
    assert model_fingerprint(model) == model_fingerprint(made)
    of_sites = [get_linear(model, name).weight for name in names]
    entries = sum(get_linear(dense(), name).weight.numel() for name in names)
    assert sum(w.numel() * w.element_size() for w in of_sites) == entries * (
        0.5 if kind == "nf4" else 1
    )
    with torch.no_grad():
        torch.testing.assert_close(model(**batches()[0]).logits, made(**batches()[0]).logits)


def test_a_folder_that_is_stored_so(tmp_path):
    model = quantized("nf4")
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path).model
    assert is_quantized(again)
    assert model_fingerprint(again) == model_fingerprint(model)
    with pytest.raises(CordaError, match=r"quantised already \(bitsandbytes 4-bit\).*leave it out"):
        load_model(tmp_path, quantization="nf4")


def test_clip_of_transformers_and_of_open_clip():
    model = load_model("emoji-clip-hf", quantization="int8").model
    site = find_sites(model)[0].name
    assert storage_of(get_linear(model, site)) == "int8"
    with pytest.raises(CordaError, match=r"models of transformers.*-hf"):
        load_model("emoji-clip", quantization="int8")


def test_in_memory_and_back(caplog):
    model = dense()
    layer = model.model.layers[0].mlp.up_proj
    model.model.layers[1].mlp.up_proj = NotQuiteLinear(64, 128, bias=False)
    with caplog.at_level(logging.INFO):
        assert quantize_model(model, "nf4") is model
    assert "1 layers keep their weights as they are" in caplog.text
    assert model.is_loaded_in_4bit
    assert storage_of(model.model.layers[0].mlp.up_proj) == "nf4"
    with pytest.raises(CordaError, match="stored as nf4 already"):
        quantize_model(model, "int8")
    dequantize_model(model)
    assert not is_quantized(model)
    assert model.config.to_dict().get("quantization_config") is None
    back = model.model.layers[0].mlp.up_proj.weight
    error = float((back - layer.weight).detach().norm() / layer.weight.detach().norm())
    assert 0 < error < 0.12


def test_rows_that_a_cpu_misreads(tmp_path, caplog):
    """What transformers quantises all the same is warned of; in memory such layers stay as they are."""
    if not is_misread(nn.Linear(32, 64), "nf4"):
        pytest.skip("this bitsandbytes reads them right on this processor")
    make("llama").save_pretrained(tmp_path)  # 32 wide
    load_model(tmp_path, quantization="nf4")
    assert "reads 14 layers of four bits wrongly on a CPU" in caplog.text
    caplog.clear()
    with pytest.raises(CordaError, match="can be quantised"):
        quantize_model(make("llama"), "nf4")
    quantize_model(make("llama"), "int8")


@pytest.mark.skipif(t.__version__.startswith("4."), reason="experts are stacks in transformers 5")
def test_experts_stay_as_they_are_and_are_told_of(tmp_path, caplog):
    moe_toy.make("qwen2_moe").save_pretrained(tmp_path)
    load_model(tmp_path)
    assert "experts" not in caplog.text
    model = load_model(tmp_path, quantization="int8").model
    assert (
        "the experts of 2 layers share a parameter each, which bitsandbytes does not" in caplog.text
    )
    kinds = {
        site.role: storage_of(get_linear(model, site.name))
        for site in find_sites(model, roles="q,o")
    }
    assert kinds == {"q": "int8", "o": "int8"}


def test_refusals():
    with pytest.raises(CordaError, match="nf4 or int8; got 'fp8'"):
        quantize_model(dense(), "fp8")
    with pytest.raises(CordaError, match=r"has no nn\.Linear that can be quantised"):
        quantize_model(nn.LayerNorm(3), "nf4")


class NotQuiteLinear(nn.Linear):
    """Somebody's subclass, whose forward pass may read the weight."""
