"""Hooks: what counts, what is shared, and that nothing is left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from corda_vlm.covariance import observe
from corda_vlm.errors import (
    CalibrationError,
)
from corda_vlm.families.layers.attention import is_packed
from corda_vlm.sites import Site
from tests.covariance.covariance_toy import (
    TOY_SITES,
    clip_batches,
    collect,
    hook_count,
    same,
    toy,
    toy_batches,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*have no full rank")


def test_sites_of_one_stream_are_counted_once() -> None:
    model, (batch,) = toy(), toy_batches(1)
    with observe(model, TOY_SITES) as observer:
        with observer.step():
            model(**batch)
        assert hook_count(model) == 2  # b has proven that it reads what a reads
        with observer.step():
            model(**batch)
        model(**batch)  # outside of a step
    store = observer.store(data="x")
    assert (observer.batches, observer.tokens) == (2, 40)
    assert store.counts("a") == store.counts("b") == [40]
    assert torch.equal(store["a"].matrix, store["b"].matrix)
    assert list(store.streams) == ["in", "mid"]
    assert hook_count(model) == 0


def test_streams_that_are_not_shared_are_found() -> None:
    wrong = [replace(TOY_SITES[0], stream="x"), Site("embed_twin", "text", None, "up", "x")]
    model: Any = toy()
    model.embed_twin = nn.Linear(6, 6)
    forward = model.forward

    def both(input_ids: torch.Tensor) -> torch.Tensor:
        model.embed_twin(model.embed(input_ids) + 1)
        return forward(input_ids)

    with (
        pytest.raises(CalibrationError, match=r"embed_twin and a are declared to read one input"),
        observe(model, wrong) as observer,
        observer.step(),
    ):
        both(toy_batches(1)[0]["input_ids"])
    assert hook_count(model) == 0

    def twice(input_ids: torch.Tensor) -> torch.Tensor:
        x = model.embed(input_ids)
        model.embed_twin(x)
        model.embed_twin(x)
        return forward(input_ids)

    with (
        pytest.raises(CalibrationError, match=r"called a 1 times, embed_twin 2 times"),
        observe(model, wrong) as observer,
        observer.step(),
    ):
        twice(toy_batches(1)[0]["input_ids"])
    with (
        pytest.raises(CalibrationError, match=r"their widths are \[6, 12\]"),
        observe(model, [TOY_SITES[0], replace(TOY_SITES[2], stream="in")]),
    ):
        pass
    assert hook_count(model) == 0


def test_equal_copies_are_one_stream() -> None:
    model = toy()

    def forward(model: Any, batch: dict) -> None:
        x = model.embed(batch["input_ids"])
        model.c(model.a(x) + model.b(x.clone()))

    store = collect(model, toy_batches(2), TOY_SITES, forward=forward)
    assert store.counts("b") == [40]


def test_a_module_called_twice_counts_both() -> None:
    model, (batch,) = toy(), toy_batches(1)
    x = model.embed(batch["input_ids"]).detach()

    def forward(model: Any, batch: dict) -> None:
        model.a(x)
        model.a(2 * x)

    store = collect(model, [batch], TOY_SITES[:1], forward=forward)
    rows = torch.cat([x, 2 * x]).reshape(-1, 6).double()
    assert store["a"].count == len(rows)
    torch.testing.assert_close(store["a"].matrix, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_keyword_arguments_and_every_mode_of_running() -> None:
    model, (batch,) = toy(), toy_batches(1)
    reference = collect(model, [batch], TOY_SITES)

    def keyword(model: Any, batch: dict) -> None:
        x = model.embed(input=batch["input_ids"])
        model.c(input=model.a(input=x) * torch.sigmoid(model.b(input=x)))

    def inference(model: nn.Module, batch: dict) -> None:
        with torch.inference_mode():
            model(**batch)

    def checkpointed(model: Any, batch: dict) -> None:
        with torch.enable_grad():
            x = model.embed(batch["input_ids"])
            run = lambda x: model.c(model.a(x) * torch.sigmoid(model.b(x)))  # noqa: E731
            recomputed(run, x, use_reentrant=False).sum().backward()

    for forward in (keyword, inference, checkpointed):
        assert same(collect(model, [batch], TOY_SITES, forward=forward), reference), forward
        twice = collect(model, [batch, batch], TOY_SITES, forward=forward)
        assert twice.counts("a") == [40]
    assert model.embed.weight.grad is not None  # the backward pass did run

    def autocast(model: nn.Module, batch: dict) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch)

    mixed = collect(model, [batch, batch], TOY_SITES, forward=autocast)
    torch.testing.assert_close(
        mixed["a"].matrix, reference["a"].matrix, rtol=1e-5, atol=1e-6
    )  # x itself is float32; the sum was not rounded to bfloat16


def test_the_model_is_left_as_it_was(tiny_open_clip: Any) -> None:
    tiny_open_clip.train()
    tiny_open_clip.visual.eval()
    modes = {name: m.training for name, m in tiny_open_clip.named_modules()}
    weights = {k: v.clone() for k, v in tiny_open_clip.state_dict().items()}
    batches = clip_batches([2, 2])

    def failing(model: nn.Module, batch: dict) -> None:
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        assert hook_count(model) > 0
        raise RuntimeError("stop here")

    collect(tiny_open_clip, batches)
    for _ in range(2):
        assert {name: m.training for name, m in tiny_open_clip.named_modules()} == modes
        assert hook_count(tiny_open_clip) == 0
        assert all(torch.equal(v, weights[k]) for k, v in tiny_open_clip.state_dict().items())
        assert any(is_packed(m) for m in tiny_open_clip.modules())
        assert torch.is_grad_enabled()
        with pytest.raises(RuntimeError, match="stop here"):
            collect(tiny_open_clip, batches, forward=failing)


def test_a_model_with_an_adapter_is_observed_at_its_base(tiny_clip_hf: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    batches = clip_batches([4])
    plain = collect(tiny_clip_hf, batches)
    wrapped = get_peft_model(tiny_clip_hf, LoraConfig(target_modules=["q_proj", "fc1"], r=2))
    adapted = collect(wrapped, batches)  # B is zero: nothing has changed yet
    assert same(plain, adapted)
    assert plain.model_fingerprint == adapted.model_fingerprint
