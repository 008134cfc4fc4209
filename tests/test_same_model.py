"""A file of a model fits its quantised copy, and no other."""

from __future__ import annotations

import logging

import pytest
import torch

from corda_vlm import CovarianceStore, collect_covariance, plan_adapter
from corda_vlm.errors import ForeignFileError
from corda_vlm.plan import AdapterPlan
from corda_vlm.same_model import is_made_from, model_signs
from corda_vlm.sites import model_fingerprint
from tests.quantized_toy import KINDS, batches, dense, quantized


def of(model):
    return model_fingerprint(model), model_signs(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_known_in_both_directions_and_said(kind, caplog):
    original, copy = dense(), quantized(kind)
    with caplog.at_level(logging.INFO):
        assert is_made_from(copy, *of(original), "the store")
    assert "the store: made from the model" in caplog.text
    assert "of which this one is a quantised copy" in caplog.text
    assert is_made_from(original, *of(copy), "it")
    assert is_made_from(copy, *of(copy), "it")
    assert not is_made_from(copy, of(original)[0], None, "it")  # of a former version


def _with_tiny_rows():
    model = dense()
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.dim() == 2:
            parameter.data[: len(parameter) // 4] *= 1e-3
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_whose_scales_are_rounded_away_say_nothing(kind):
    assert is_made_from(quantized(kind, _with_tiny_rows()), *of(_with_tiny_rows()), "it")
    assert not is_made_from(quantized(kind, dense().apply(_turn)), *of(_with_tiny_rows()), "it")


def test_two_copies_of_one():
    assert is_made_from(quantized("int8"), *of(quantized("nf4")), "it")


def test_dense_models_are_the_same_or_not(caplog):
    """Rounding away small weights makes no copy of what is not quantised."""
    original, pruned = dense(), dense()
    weight = pruned.model.layers[0].mlp.up_proj.weight.data
    weight[weight.abs() < weight.abs().median()] = 0
    assert not is_made_from(pruned, *of(original), "it")
    assert is_made_from(original, *of(original), "it")


def test_another_model_is_refused():
    torch.manual_seed(5)
    other = dense()
    for parameter in other.parameters():
        parameter.data.normal_()
    assert not is_made_from(quantized("nf4"), *of(other), "it")
    turned = dense()
    turned.model.layers[1].self_attn.q_proj.weight.data.neg_()
    assert not is_made_from(quantized("nf4"), *of(turned), "it")


def test_stores_and_plans_of_the_original_are_used_for_its_copy(tmp_path):
    original, copy = dense(), quantized("nf4")
    collect_covariance(original, batches(), path=tmp_path / "c.safetensors", show_progress=False)
    store = CovarianceStore.load(tmp_path / "c.safetensors", model=copy)
    plan = plan_adapter(copy, store, rank=2, show_progress=False)
    plan.save(tmp_path / "plan.json")
    again = AdapterPlan.load(tmp_path / "plan.json", model=original)
    assert again.model_signs == model_signs(copy)
    other = quantized("nf4", dense().apply(_turn))
    with pytest.raises(ForeignFileError, match="was made from another model"):
        CovarianceStore.load(tmp_path / "c.safetensors", model=other)
    with pytest.raises(ForeignFileError, match="was made for the 'llm' model"):
        again.check(other)


def _turn(module):
    if isinstance(module, torch.nn.Linear):
        module.weight.data.neg_()
