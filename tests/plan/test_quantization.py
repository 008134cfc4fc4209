"""What quantising costs, and plans that take it back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t

from corda_vlm import (
    attach_adapter,
    collect_covariance,
    export_adapter,
    load_model,
    plan_adapter,
)
from corda_vlm.adapter.paired import trained
from corda_vlm.errors import CordaError
from corda_vlm.families.layers.quantized import rounded
from corda_vlm.families.loading.quantization import quantize_model
from corda_vlm.plan import AdapterPlan, quantization_errors
from corda_vlm.sites import find_sites, get_linear
from tests.families.moe_toy import make
from tests.quantized_toy import batches, dense, quantized

pytest.importorskip("bitsandbytes", reason="the extra corda-vlm[quantized] is not installed")


@pytest.fixture(scope="module")
def store():
    return collect_covariance(dense(), batches(), show_progress=False)


def plan_of(store: Any, **options: Any) -> Any:
    return plan_adapter(dense(), store, rank=8, show_progress=False, **options)


def errors(store: Any, kind: Any, **options: Any) -> Any:
    return quantization_errors(dense(), kind, store=store, show_progress=False, **options)


def test_rounded_is_what_the_layer_has():
    for kind in ("nf4", "int8"):
        layer = get_linear(quantized(kind), "model.layers.0.mlp.up_proj")
        there = rounded(get_linear(dense(), "model.layers.0.mlp.up_proj").weight.detach(), kind)
        x = torch.randn(2, 64)
        torch.testing.assert_close(layer.train()(x), x @ there.T)


def test_errors_of_each_way_and_their_order(store):
    plain = errors(store, "nf4")
    assert list(plain.errors) == ["Q(W)"]
    assert len(plain.errors["Q(W)"]) == 14
    assert 0.07 < plain.total("Q(W)").relative < 0.12
    assert plain.total("Q(W)").relative > 5 * errors(store, "int8").total("Q(W)").relative
    pissa = errors(store, "nf4", plan=plan_of(store, method="pissa"))
    residual = pissa.total("Q(W − B₀A₀) + B₀A₀")
    assert residual.relative < pissa.total("Q(W)").relative  # QPiSSA's claim
    qera, loftq = (
        errors(store, "nf4", plan=plan_of(store, method=m, quantize_to="nf4")).total("Q(W) + B A")
        for m in ("qera", "loftq")
    )
    assert qera.relative_outputs < loftq.relative_outputs < plain.total("Q(W)").relative_outputs
    assert loftq.relative < qera.relative < plain.total("Q(W)").relative
    table = str(pissa)
    assert "Q(W − B₀A₀) + B₀A₀" in table
    assert "of the outputs" in table
    assert "language  up" in table
    assert "of the outputs" not in str(quantization_errors(dense(), "nf4", show_progress=False))


@pytest.mark.parametrize("method", ["qera", "loftq"])
def test_the_start_is_nearer_to_the_original(method, store, tmp_path):
    plan = plan_of(store if method == "qera" else None, method=method, quantize_to="nf4")
    plan.save(tmp_path / "plan.json")
    again = AdapterPlan.load(tmp_path / "plan.json", model=quantized("nf4"))
    assert again.quantize_to == "nf4"
    model = attach_adapter(quantized("nf4"), again)

    def logits(one: Any) -> torch.Tensor:
        with torch.no_grad():
            return one(**batches()[0]).logits

    original, base = logits(dense()), logits(quantized("nf4"))
    assert float((logits(model) - original).norm()) < 0.9 * float((base - original).norm())
    assert str(model.peft_config["default"].peft_type) in ("LORA", "PeftType.LORA")
    name = find_sites(dense())[0].name
    B, A = trained(model.get_base_model().get_submodule(name), "default")
    assert B.requires_grad
    torch.testing.assert_close(B @ A, plan.factors[name].B @ plan.factors[name].A)
    export_adapter(model, tmp_path / "merged", format="merged")
    merged = type(dense()).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(t.__version__.startswith("4."), reason="experts are stacks in transformers 5")
def test_what_is_not_quantised_has_nothing_to_take_back(caplog):
    """The experts of a mixture are one parameter, which stays as it is."""
    model = make("mixtral")
    plan = plan_adapter(
        model, None, method="loftq", quantize_to="int8", rank=2, show_progress=False
    )
    assert "16 of 24 sites keep their weights" in caplog.text
    assert "start at zero" in caplog.text
    found = quantization_errors(make("mixtral"), "int8", plan=plan, show_progress=False).errors
    for site in plan.sites:
        name, is_expert = site.site.name, site.site.pool is not None
        plain, corrected = (found[way][name].relative for way in ("Q(W)", "Q(W) + B A"))
        assert (plain == corrected == 0) if is_expert else (0 < corrected < plain)
        assert bool(plan.factors[name].B.any()) != is_expert
        assert plan.factors[name].A.any()  # or nothing would be learned
    attach_adapter(quantize_model(model, "int8"), plan)
    with pytest.raises(CordaError, match=r"the 16 sites keep theirs as they are"):
        plan_adapter(
            make("mixtral"), None, method="loftq", quantize_to="int8", rank=2, targets="*.experts.*"
        )


def test_parts_of_packed_attention_stay_as_they_are():
    model: Any = load_model("emoji-clip").model
    options: Any = {"towers": "vision", "rank": 2, "show_progress": False}
    plan = plan_adapter(model, None, method="loftq", quantize_to="int8", **options)
    corrected = {s.site.role for s in plan.sites if plan.factors[s.site.name].B.any()}
    assert corrected == {"up", "down"}
    with pytest.raises(CordaError, match=r"has a matrix in visual.*\.mlp\.c_fc: attach it to"):
        attach_adapter(model, plan)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)[0]
        there = attach_adapter(quantize_model(model, "int8"), plan)(images)[0]
    assert float((there - before).norm() / before.norm()) < 0.05


def test_refusals(store):
    plan = plan_of(store, method="qera", quantize_to="nf4")
    with pytest.raises(
        CordaError,
        match=r"has a matrix in model.layers.0.self_attn.q_proj: attach it to load_model.*quantization='nf4'",
    ):
        attach_adapter(dense(), plan)
    with pytest.raises(CordaError, match=r"has int8 in model.*: attach it to load_model"):
        attach_adapter(quantized("int8"), plan)
    with pytest.raises(CordaError, match=r"quantised already: load it without quantization"):
        plan_adapter(quantized("nf4"), store, method="qera", quantize_to="nf4", rank=4)
    with pytest.raises(CordaError, match="quantised already"):
        quantization_errors(quantized("nf4"), "nf4")
    with pytest.raises(CordaError, match=r"'qera' takes back.*quantize_to='nf4'"):
        plan_of(store, method="qera")
    with pytest.raises(CordaError, match=r"quantize_to is of loftq, qera.*'corda' does not"):
        plan_of(store, method="corda", quantize_to="nf4")
