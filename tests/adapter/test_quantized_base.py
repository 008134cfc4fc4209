"""Adapters over bases in four and eight bits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers as t
from peft import PeftModel

from corda_vlm import (
    anchor_penalty,
    attach_adapter,
    collect_covariance,
    export_adapter,
    load_adapter,
    load_model,
    plan_adapter,
    prepare_method,
    restore,
)
from corda_vlm.__main__ import main
from corda_vlm.adapter import at_scale, quantize_base
from corda_vlm.adapter.paired import base_matrix, paired_layers
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.families.layers.quantized import storage_of
from corda_vlm.same_model import is_quantized
from corda_vlm.sites import find_sites, get_linear, model_fingerprint, site_weights
from corda_vlm.train.terms import distillation
from tests.families.language_toy import make, text_batch
from tests.quantized_toy import (
    KINDS,
    OF_BITSANDBYTES,
    batches,
    dense,
    dequantized_copy,
    quantized,
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batches()[0]).logits


def plan_of(model: Any, **options: Any) -> Any:
    store = collect_covariance(model, batches(), show_progress=False)
    return plan_adapter(model, store, rank=4, show_progress=False, **options)


def trained_on(model: Any, steps: int = 5) -> Any:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        loss = model(**batches()[0]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def attached(request):
    """The kind, and a model with a trained adapter beside its outputs before and at the start."""
    bare = quantized(request.param)
    before = logits(bare)
    model = attach_adapter(bare, plan_of(bare, mode="ipm"))
    return request.param, before, logits(model), trained_on(model)


class TestUntouched:
    def test_the_start_is_the_quantised_model_to_the_bit(self, attached):
        _, before, start, model = attached
        assert torch.equal(start, before)
        # and training has learned something, of A and B alone
        assert not torch.allclose(logits(model), before, atol=1e-2)
        assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
        losses = [float(m(**batches()[0]).loss.detach()) for m in (model, dense())]
        assert losses[0] < 3.9 < losses[1]

    def test_scales_and_the_base_alone(self, attached):
        _, before, _, model = attached
        now = logits(model)
        with at_scale(model, 0.0):
            assert torch.equal(logits(model), before)
        with at_scale(model, 0.5):
            assert 0 < float((logits(model) - before).norm()) < float((now - before).norm())
        with model.disable_adapter():
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), now)

    def test_it_is_the_dense_model_that_it_stands_for(self, attached):
        """The sites' weights, the plan, and in four bits the outputs and gradients."""
        kind, _, _, _ = attached
        if kind != "nf4":
            pytest.skip("of eight bits the products of evaluation are rounded too")
        bare = quantized(kind)
        twin = dequantized_copy(bare)
        one, other = (attach_adapter(m, plan_of(m, mode="ipm")) for m in (bare, twin))
        for a, b in zip(*(paired_layers(m).values() for m in (one, other)), strict=True):
            torch.testing.assert_close(a.lora_A["default"].weight, b.lora_A["default"].weight)
        losses = [m.train()(**batches()[0]).loss for m in (one, other)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            if a.requires_grad:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)

    def test_saved_and_loaded(self, attached, tmp_path):
        kind, before, _, model = attached
        model.save_pretrained(tmp_path)
        again = load_adapter(quantized(kind), tmp_path)
        assert torch.equal(logits(again), logits(model))
        assert json.loads((tmp_path / "adapter_config.json").read_text())["quantization"] is None
        assert torch.equal(logits(restore(again)), before)
        with pytest.raises(ForeignFileError, match="was made for the model"):
            load_adapter(dense(), tmp_path)

    def test_exports(self, attached, tmp_path):
        """A plain LoRA on the quantised base, and a whole model of matrices."""
        kind, _, _, model = attached
        export_adapter(model, tmp_path / "lora")
        plain = PeftModel.from_pretrained(quantized(kind), str(tmp_path / "lora"))
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-3, atol=1e-4)
        export_adapter(model, tmp_path / "merged", format="merged")
        merged = type(dense()).from_pretrained(tmp_path / "merged")
        assert not is_quantized(merged)
        assert "quantization_config" not in json.loads(
            (tmp_path / "merged" / "config.json").read_text()
        )
        stands_for = merged.eval()
        tolerance = 0.03 if kind == "int8" else 1e-4  # it rounds the inputs of layers too
        torch.testing.assert_close(logits(stands_for), logits(model), rtol=0.05, atol=tolerance)
        assert is_quantized(model)  # nothing was changed
        with pytest.raises(CordaError, match=r"merged into that.*format='merged'"):
            model.merge_and_unload()

    def test_the_anchor_is_that_of_the_dense_model(self, attached):
        kind, _, _, model = attached
        store = collect_covariance(quantized(kind), batches(), show_progress=False)
        anchor = anchor_penalty(model, store)
        value = anchor()
        value.backward()
        assert float(value.detach()) > 0
        W = site_weights(model, anchor.sites)[anchor.sites[0]]
        P, Q = paired_layers(model)[anchor.sites[0]].change("default")
        C = store[anchor.sites[0]].matrix.double()
        delta = (P @ Q).detach().double()
        expected = ((delta @ C) * delta).sum() / ((W.double() @ C) * W.double()).sum()
        assert anchor.report()[anchor.sites[0]] == pytest.approx(float(expected), rel=1e-3)

    def test_distillation(self, attached):
        _, _, _, model = attached
        term = distillation(model, batches())
        value = term(0)
        assert float(value.detach()) == pytest.approx(0, abs=1e-5)

    def test_the_original_store_and_plan(self, attached):
        kind = attached[0]
        plan = plan_of(dense())
        bare = quantized(kind)
        before = logits(bare)
        model = attach_adapter(bare, plan)
        assert torch.equal(logits(model), before)
        config: Any = model.peft_config["default"]
        assert config.origin["model_fingerprint"] == model_fingerprint(bare)

    def test_lora_of_peft(self, attached, tmp_path):
        kind = attached[0]
        model = trained_on(prepare_method("lora", quantized(kind), rank=4), 2)
        export_adapter(model, tmp_path / "merged", format="merged")
        merged = type(dense()).from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(logits(merged), logits(model), rtol=0.05, atol=0.03)


def test_what_a_quantised_base_is_not_for(tmp_path):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(CordaError, match=r"full fine-tuning trains the matrices.*load it without"):
        prepare_method("full", quantized("nf4"))
    with pytest.raises(CordaError, match=r"mica takes its directions from the weights"):
        prepare_method("mica", quantized("nf4"), rank=4)
    model = prepare_method("dora", quantized("nf4"), rank=4)
    with pytest.raises(CordaError, match=r"on a quantised base is no plain LoRA"):
        export_adapter(model, tmp_path, format="merged")


def test_conv1d_of_gpt2_come_back_as_such(tmp_path):
    """transformers quantises them as linear layers, whose weights lie the other way."""
    pytest.importorskip("bitsandbytes")
    make("gpt2").save_pretrained(tmp_path / "base")
    bare: Any = load_model(tmp_path / "base", quantization="int8").model
    batch = text_batch(2)
    model = attach_adapter(bare, plan_adapter(bare, None, method="pissa", rank=2))
    model.train()(**batch).loss.backward()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.sub_(parameter.grad)
    export_adapter(model.eval(), tmp_path / "merged", format="merged")
    merged = t.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    kinds = {type(m).__name__ for n, m in merged.named_modules() if n.endswith("c_fc")}
    assert kinds == {"Conv1D"}
    with torch.no_grad():
        there, expected = (m(**batch).logits for m in (merged, model))
    assert float((there - expected).norm() / expected.norm()) < 0.02
    assert is_quantized(model)


@pytest.mark.parametrize("kind", OF_BITSANDBYTES)
class TestResidual:
    def test_what_is_quantised_is_what_the_pair_leaves(self, kind, tmp_path):
        original = dense()
        model = attach_adapter(dense(), plan_of(dense(), mode="ipm"), base="residual")
        residuals = {
            n: base_matrix(layer).read().clone() for n, layer in paired_layers(model).items()
        }
        pytest.importorskip("bitsandbytes")
        assert quantize_base(model, kind) is model
        for name, layer in paired_layers(model).items():
            assert storage_of(layer.get_base_layer()) == kind
            error = (base_matrix(layer).read() - residuals[name]).norm() / residuals[name].norm()
            assert 0 < float(error) < 0.12
        start = logits(model)
        nearer = (start - logits(original)).norm() < (
            logits(quantized(kind)) - logits(original)
        ).norm()
        assert kind == "int8" or bool(nearer)
        trained_on(model)
        assert not torch.allclose(logits(model), start, atol=1e-3)
        model.save_pretrained(tmp_path)
        again = load_adapter(dense(), tmp_path)
        assert is_quantized(again)
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
        with pytest.raises(CordaError, match=r"rounded twice.*original weights.*quantize_base"):
            load_adapter(quantized(kind), tmp_path)

    def test_of_a_base_that_is_quantised_already(self, kind):
        bare = quantized(kind)
        with pytest.raises(CordaError, match=r"rounded twice.*quantize_base"):
            attach_adapter(bare, plan_of(bare), base="residual")
        assert find_sites(bare)
        assert storage_of(get_linear(bare, find_sites(bare)[0].name)) == kind

    def test_parts_of_packed_attention_stay_as_they_are(self, kind):
        if kind == "nf4":
            pytest.skip("which layers those are does not depend on the kind")
        model: Any = load_model("emoji-clip").model
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            before = model.encode_image(images)
        options: Any = {"towers": "vision", "rank": 4, "show_progress": False}
        attached = attach_adapter(
            model, plan_adapter(model, None, method="pissa", **options), base="residual"
        )
        for name, layer in paired_layers(quantize_base(attached, kind)).items():
            stays = ".attn." in name
            assert storage_of(layer.get_base_layer()) == (None if stays else kind)
        with torch.no_grad():
            restored: Any = restore(attached)
            after = restored.encode_image(images)
        assert float((after - before).norm() / before.norm()) < 0.05

    def test_a_bare_model(self, kind):
        with pytest.raises(CordaError, match=r"load_model\(\.\.\., quantization="):
            quantize_base(dense(), kind)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    """What quantising would cost is printed beside a plan, and the residual of its pair is trained on in eight bits."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    plan = ["plan", "emoji-clip-hf", "--method", "pissa", "--rank", "2", "--towers", "vision"]
    main([*plan, "--rounding", "int8"])
    assert "relative errors against the original weights, of int8" in capsys.readouterr().out
    main([*plan[:2], "--method=loftq", "--quantize-to=int8", "--output=loftq.json", *plan[-2:]])
    assert "train emoji-clip-hf DATA --quantization int8 --plan" in capsys.readouterr().out
    data = [
        "sklearn:digits",
        "--steps=1",
        "--batch-size=4",
        "--output=a",
    ]
    main(["train", "emoji-clip-hf", *data, "--base=residual", "--quantize-base=int8"])
    config = json.loads((tmp_path / "a" / "weights" / "adapter_config.json").read_text())
    assert (config["base"], config["quantization"]) == ("residual", "int8")
    again = load_adapter(load_model("emoji-clip-hf").model, tmp_path / "a")
    assert is_quantized(again)
