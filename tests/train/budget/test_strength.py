"""The largest strength that keeps a budget, and models of any strength."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from corda_vlm.adapter import at_scale
from corda_vlm.methods import prepare_method
from corda_vlm.train.budget.strength import STEPS, Course, largest_strength
from tests.train.terms.conftest import moved, weights

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@given(st.floats(0.0, 1.0))
def test_halving_finds_the_largest(edge) -> None:
    found = largest_strength(lambda strength: strength <= edge)
    assert found <= edge
    assert edge - found <= 2.0**-STEPS


def test_strength_0_is_never_asked_for() -> None:
    asked = []
    assert largest_strength(lambda strength: bool(asked.append(strength))) == 0.0
    assert min(asked) > 0


def seen(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().encode_image(PIXELS)


@pytest.mark.parametrize("method", ["lora", "full", "dora"])
def test_the_ends_are_the_model_before_and_after_to_the_bit(method, tiny_open_clip) -> None:
    model = prepare_method(method, tiny_open_clip, rank=2, towers="vision")
    course, first = Course(model), seen(model)
    moved(model)
    last, trained = seen(model), weights(model)
    course.arrive()
    course.go_to(0.3)
    assert not torch.equal(seen(model), last)
    course.go_to(0.0)
    assert torch.equal(seen(model), first)
    course.go_to(1.0)
    assert torch.equal(seen(model), last)
    assert all(torch.equal(value, trained[name]) for name, value in weights(model).items())


def test_a_model_that_gets_new_tensors_is_followed(tiny_open_clip) -> None:
    """As one does that goes to another device."""
    model = prepare_method("full", tiny_open_clip, towers="vision")
    course, first = Course(model), seen(model)
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(value.detach().clone(), value.requires_grad))
    moved(model)
    last = seen(model)
    course.arrive()
    course.go_to(0.0)
    assert torch.equal(seen(model), first)
    course.go_to(1.0)
    assert torch.equal(seen(model), last)


@pytest.mark.parametrize("method", ["lora", "full", "frozen"])
def test_it_is_the_line_of_weights(method, tiny_open_clip) -> None:
    """W + s ΔW, as `at_scale` makes it for a moment."""
    base = copy.deepcopy(tiny_open_clip)
    if method == "frozen":
        names = [
            n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "c_fc" in n
        ]
        model = get_peft_model(tiny_open_clip, LoraConfig(r=2, target_modules=names))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)
    else:
        model = prepare_method(method, tiny_open_clip, rank=2, towers="vision")
    course = Course(model)
    moved(model)
    with at_scale(model, 0.4, base=base):
        wanted = seen(model)
    course.arrive()
    course.go_to(0.4)
    torch.testing.assert_close(seen(model), wanted, rtol=1e-4, atol=1e-5)
