"""Experts and routers shown as `nn.Linear`: equal outputs, views of the stack, and the original put back."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from torch import nn

from corda_vlm.errors import CordaError, NoSitesError
from corda_vlm.families.layers.attention import pack, unpack, unpacked
from corda_vlm.families.layers.experts import is_router, is_stack, slices_of
from corda_vlm.sites import find_sites, get_linear, site_slices, site_weights
from tests.families.language_toy import inputs_of, text_batch
from tests.families.moe_toy import MIXTURES, make

pytestmark = pytest.mark.skipif(
    t.__version__.startswith("4."), reason="experts are stacks in transformers 5"
)


def logits(model, batch):
    with torch.no_grad():
        return model(**inputs_of(batch)).logits


@pytest.mark.parametrize("name", MIXTURES)
def test_outputs_are_equal_and_the_original_returns(name):
    model, batch = make(name), text_batch(3)
    expected, before = logits(model, batch), dict(model.named_parameters())
    with unpacked(model):
        assert not any(is_stack(m) for m in model.modules())
        assert torch.allclose(logits(model, batch), expected, atol=2e-6)
        sites = [*find_sites(model), *find_sites(model, roles="router")]
        assert all(isinstance(get_linear(model, s.name), nn.Linear) for s in sites)
        assert not model.training
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_whatever_multiplies_them(implementation):
    model, batch = make("gpt_oss"), text_batch(3)
    model.set_experts_implementation(implementation)
    expected = logits(model, batch)
    with unpacked(model):
        assert torch.allclose(logits(model, batch), expected, atol=2e-6)
    assert model.config._experts_implementation == implementation


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_a_weight_is_a_view_as_out_by_in(name):
    model = make(name)
    path, part = next((n, s) for n, s in site_slices(model).items() if n.endswith("down_proj.2"))
    experts = model.get_submodule(part.module)
    stack = experts.down_proj
    own = stack[2] if name == "mixtral" else stack[2].T
    assert tuple(own.shape) == (32, 48)
    assert torch.equal(site_weights(model, [path])[path], own)
    with unpacked(model):
        with torch.no_grad():
            get_linear(model, path).weight.mul_(2)
        assert site_weights(model, [path])[path].data_ptr() == stack[2].data_ptr()
    assert torch.equal(site_weights(model, [path])[path], own)  # the edit was one of the stack


def test_another_precision_inside_comes_back():
    model = make("gpt_oss")
    with unpacked(model):
        model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model, text_batch(2)).dtype == torch.bfloat16


def test_a_gradient_reaches_the_experts_that_saw_tokens():
    model, batch = make("qwen2_moe"), text_batch(1, 3)
    with unpacked(model):
        model(**batch).loss.backward()
        gradients = [get_linear(model, s.name).weight.grad for s in find_sites(model) if s.pool]
    assert any(g is None for g in gradients)
    assert any(g is not None and g.any() for g in gradients)


def test_nothing_is_unpacked_for_an_adapter():
    """PEFT adapts the stack itself."""
    model = make("mixtral")
    assert unpack(model) == []
    names = [f"model.layers.{n}.mlp.{part}" for n in (0, 1) for part in ("gate", "experts")]
    assert unpack(model, experts=True) == names
    assert pack(model) == names
    name = "model.layers.0.mlp.experts"
    with pytest.raises(
        NoSitesError, match=r"model\.layers\.0\.mlp\.experts keeps its experts in one"
    ):
        get_linear(model, f"{name}.gate_up_proj.1")


def test_experts_over_several_processes_are_refused():
    model = make("mixtral")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with (
        pytest.raises(CordaError, match=r"layers\.1\.mlp\.experts: its experts are spread"),
        unpacked(model),
    ):
        pass


def test_only_classes_of_transformers_are_taken_for_experts():
    class Experts(nn.Module):
        is_transposed = False

        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(2, 3, 4))

    assert not is_stack(Experts())
    assert slices_of(Experts(), "experts") == {}
    assert not is_router(nn.Linear(2, 2))
