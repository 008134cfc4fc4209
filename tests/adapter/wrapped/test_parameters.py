"""Adapters of experts: the whole way on tiny models of the real classes, and back in plain PEFT."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as t
from peft import PeftModel

from corda_vlm.adapter import (
    at_scale,
    attach_adapter,
    export_adapter,
    import_adapter,
    load_adapter,
    restore,
)
from corda_vlm.adapter.exchange.factors import changes
from corda_vlm.adapter.wrapped.carriers import carriers
from corda_vlm.covariance import collect_covariance
from corda_vlm.errors import CordaError
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import find_sites
from tests.families.language_toy import inputs_of, text_batch
from tests.families.moe_toy import MIXTURES, make

pytestmark = [
    pytest.mark.skipif(
        t.__version__.startswith("4."), reason="experts are stacks in transformers 5"
    ),
    # of a calibration of two batches
    pytest.mark.filterwarnings("ignore:.*fewer tokens than"),
]


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    return text_batch(4)


@pytest.fixture(scope="module")
def planned(batch):
    """A plan of each model, made once."""
    plans = {}

    def plan_of(name):
        if name not in plans:
            model = make(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                store = collect_covariance(model, [batch], show_progress=False)
            plans[name] = plan_adapter(model, store, rank=4, show_progress=False)
        return plans[name]

    return plan_of


def logits(model, batch):
    with torch.no_grad():
        return model(**inputs_of(batch)).logits


def step(model, batch):
    """One step of plain gradient descent; the loss before."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    loss = model(**batch).loss
    loss.backward()
    with torch.no_grad():
        for parameter in trainable:
            parameter.sub_(parameter.grad)
            parameter.grad = None
    return float(loss.detach())


QUICK = ("mixtral", "llama4_text")  # all are tried with the slow tests


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MIXTURES]
)
def test_the_whole_way(tmp_path, name, planned, batch):
    model, plan = make(name), planned(name)
    before = logits(model, batch)
    attached = attach_adapter(model, plan)
    assert torch.equal(logits(attached, batch), before)
    trainable = sum(p.numel() for p in attached.parameters() if p.requires_grad)
    assert trainable == plan.parameters
    step(attached, batch)
    after = logits(attached, batch)
    assert not torch.allclose(after, before, atol=0.1)
    with at_scale(attached, 0.0):
        assert torch.equal(logits(attached, batch), before)

    attached.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_adapter(make(name), tmp_path / "saved"), batch), after)
    export_adapter(attached, tmp_path / "lora")
    plain = PeftModel.from_pretrained(make(name), str(tmp_path / "lora"))
    assert torch.allclose(logits(plain, batch), after, atol=1e-5)
    export_adapter(attached, tmp_path / "merged", format="merged")
    merged = t.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged, batch), after, atol=2e-5)
    assert torch.equal(logits(restore(attached), batch), before)


@pytest.mark.parametrize(
    "name",
    ["gpt_oss", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mixtral", "llama4_text"))],
)
def test_a_residual_base(tmp_path, name, planned, batch):
    model = make(name)
    before = logits(model, batch)
    attached = attach_adapter(model, planned(name), base="residual")
    assert torch.allclose(logits(attached, batch), before, atol=2e-5)
    with attached.disable_adapter():
        assert not torch.allclose(logits(attached, batch), before, atol=1e-3)
    step(attached, batch)
    after = logits(attached, batch)
    with at_scale(attached, 0.0):
        assert torch.allclose(logits(attached, batch), before, atol=2e-5)
    attached.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_adapter(make(name), tmp_path / "saved"), batch), after)
    export_adapter(attached, tmp_path / "residual", format="residual")
    base = t.AutoModelForCausalLM.from_pretrained(tmp_path / "residual" / "base")
    plain = PeftModel.from_pretrained(base, str(tmp_path / "residual"))
    assert torch.allclose(logits(plain, batch), after, atol=1e-5)
    assert torch.allclose(logits(restore(attached), batch), before, atol=2e-5)


@pytest.mark.parametrize("base", ["untouched", "residual"])
def test_half_a_scale_is_half_the_change(base, planned, batch):
    attached = attach_adapter(make("mixtral"), planned("mixtral"), base=base)
    step(attached, batch)
    whole = changes(attached, "default")
    with at_scale(attached, 0.5):
        expected = {site: (B * 0.5) @ A for site, (B, A) in whole.items()}
        for carrier in carriers(attached):
            layer: Any = carrier.layer
            if carrier.stacked:
                B0, A0 = layer.pair("default")
                got = layer.get_delta_weight("default") - (B0 @ A0 if base == "residual" else 0)
                for number, site in enumerate(carrier.sites):
                    assert torch.allclose(got[number], expected[site], atol=1e-6)


@pytest.mark.filterwarnings("ignore:freeze_a bounds")
@pytest.mark.parametrize("name", ["mixtral", "llama4_text"])
def test_a_frozen_a_stays(name, planned, batch):
    attached = attach_adapter(make(name), planned(name), freeze_a=True)
    step(attached, batch)
    for carrier in carriers(attached):
        layer: Any = carrier.layer
        B, A = layer.change("default")
        assert torch.equal(A, layer.pair("default")[1])
        assert A.shape[-2] == 4
        assert B.any()


def test_merging_and_back_is_to_the_bit(planned, batch):
    attached = attach_adapter(make("gpt_oss"), planned("gpt_oss"))
    step(attached, batch)
    after, before = logits(attached, batch), _stack(attached).clone()
    attached.merge_adapter()
    assert torch.allclose(logits(attached, batch), after, atol=1e-5)
    attached.unmerge_adapter()
    assert torch.equal(_stack(attached), before)
    assert torch.equal(logits(attached, batch), after)


def _stack(model):
    layer: Any = next(c.layer for c in carriers(model) if c.stacked)
    return layer.get_param().detach()


def test_a_second_adapter(planned, batch):
    attached = attach_adapter(make("mixtral"), planned("mixtral"))
    before = logits(attached, batch)
    step(attached, batch)
    after = logits(attached, batch)
    attach_adapter(attached, planned("mixtral"), adapter_name="second")
    attached.set_adapter("second")
    assert torch.equal(logits(attached, batch), before)
    attached.set_adapter("default")
    assert torch.equal(logits(attached, batch), after)


def test_half_precision_starts_as_the_model(planned, batch):
    model = make("mixtral").to(torch.bfloat16)
    before = logits(model, batch)
    attached = attach_adapter(model, planned("mixtral"))
    assert torch.equal(logits(attached, batch), before)


def test_routers_and_shared_experts_where_they_are_asked_for(tmp_path, batch):
    model = make("qwen2_moe")
    before = logits(model, batch)
    targets = ["*.mlp.gate", "*.experts.*", "*.shared_expert.*"]
    store = collect_covariance(model, [batch], targets=targets, show_progress=False)
    plan = plan_adapter(model, store, rank=2, targets=targets, show_progress=False)
    routers = [s.site.name for s in plan.sites if s.site.role == "router"]
    assert routers == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    attached = attach_adapter(model, plan)
    assert torch.equal(logits(attached, batch), before)
    step(attached, batch)
    after = logits(attached, batch)
    export_adapter(attached, tmp_path / "lora")
    plain = PeftModel.from_pretrained(make("qwen2_moe"), str(tmp_path / "lora"))
    assert torch.allclose(logits(plain, batch), after, atol=1e-5)


def test_some_experts_of_a_stack_are_refused(batch):
    model = make("mixtral")
    with pytest.raises(
        CordaError, match=r"give targets that are like all of them \(.*gate_up_proj\.\*\)"
    ):
        plan_adapter(
            model, None, method="pissa", rank=2, targets="*.gate_up_proj.1", show_progress=False
        )
    one = plan_adapter(
        model, None, method="pissa", rank=2, targets="*.0.*.gate_up_proj.*", show_progress=False
    )
    assert len(one.sites) == 4
    attached = attach_adapter(model, one)
    assert [len(c.sites) for c in carriers(attached)] == [4]


def test_ranks_that_differ_are_refused(batch):
    model = make("mixtral")
    store = collect_covariance(model, [batch], show_progress=False)
    with pytest.raises(
        CordaError, match="PEFT has one rank: leave dynamic_rank out, or the experts"
    ):
        plan_adapter(
            model, store, rank=4, dynamic_rank=True, rank_rule="energy", show_progress=False
        )
    roles = "q,k,v,o"
    plan = plan_adapter(
        model,
        store,
        rank=4,
        dynamic_rank=True,
        rank_rule="energy",
        roles=roles,
        show_progress=False,
    )
    assert len(plan.sites) == len(find_sites(model, roles=roles))


@pytest.mark.parametrize("name", ["qwen2_moe", "llama4_text"])
@pytest.mark.parametrize("format", ["residual", "lora"])
def test_what_plain_peft_trains_comes_home(tmp_path, name, format, planned, batch):
    export_adapter(attach_adapter(make(name), planned(name)), tmp_path / "out", format=format)
    base = make(name)
    if format == "residual":
        base = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    plain = PeftModel.from_pretrained(base, str(tmp_path / "out"), is_trainable=True)
    step(plain, batch)
    plain.save_pretrained(tmp_path / "trained")
    home = import_adapter(make(name), trained=tmp_path / "trained", start=tmp_path / "out")
    assert torch.allclose(logits(home, batch), logits(plain, batch), atol=2e-5)
    with at_scale(home, 0.0):
        assert torch.allclose(logits(home, batch), logits(make(name), batch), atol=1e-6)
