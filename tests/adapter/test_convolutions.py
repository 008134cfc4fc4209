"""Adapters on convolutions: they start at nothing, learn as PEFT's own do, and are written as what plain PEFT loads."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from corda_vlm.adapter import (
    attach_adapter,
    export_adapter,
    import_adapter,
    load_adapter,
    restore,
    scaled,
)
from corda_vlm.adapter.paired import PairedConv2d, paired_layers
from corda_vlm.adapter.wrapped.targets import lora_targets
from corda_vlm.errors import CordaError
from corda_vlm.methods import prepare_method
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import get_layer
from tests.adapter.test_adapter import embed, relative
from tests.convolutions import ConvNet, PlainConvNet, conv_targets, make_images

BASES = ("untouched", "residual")


def attached_to(
    model: nn.Module, base: Any = "untouched", rank: int = 3, **options: Any
) -> PeftModel:
    """PiSSA's pair is the largest there is: it needs no data and hides no error of the residual."""
    plan = plan_adapter(
        model, None, method="pissa", rank=rank, show_progress=False, **{"targets": conv_targets(model), **options}
    )  # fmt: skip
    return attach_adapter(model, plan, base=base)


def learn(model: nn.Module, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter) * size)


@torch.no_grad()
def out(model: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    x = make_images() if x is None else x
    return model(x.to(next(model.parameters()).dtype))


def kernel(model: nn.Module, name: str) -> torch.Tensor:
    return get_layer(model, name).weight.data


class TestStart:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_untouched_is_the_model_to_the_bit(self, dtype, channels_last):
        model = ConvNet().to(dtype)
        x = make_images().to(dtype)
        if channels_last:
            model, x = (
                model.to(memory_format=torch.channels_last),
                x.to(memory_format=torch.channels_last),
            )
        before, weights = out(model, x), copy.deepcopy(model.state_dict())
        names = set(conv_targets(model))
        attached = attached_to(model)
        assert {type(layer) for layer in paired_layers(attached).values()} == {PairedConv2d}
        assert set(paired_layers(attached)) == names
        assert torch.equal(out(attached, x), before)
        learn(attached)
        assert not torch.equal(out(attached, x), before)
        with attached.disable_adapter():
            assert torch.equal(out(attached, x), before)
        bare = restore(attached)
        assert all(torch.equal(value, weights[name]) for name, value in bare.state_dict().items())
        assert torch.equal(out(bare, x), before)

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_residual_is_the_model_up_to_rounding(self, channels_last):
        model = ConvNet()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        before = out(model)
        weight = kernel(model, "body.dilated").clone()
        attached = attached_to(model, "residual")
        layer: Any = paired_layers(attached)["body.dilated"]
        assert (layer.get_base_layer().weight - weight).norm() > 0.1 * weight.norm()
        assert relative(out(attached), before) < 1e-5
        assert relative(out(restore(attached)), before) < 1e-5


class TestForward:
    @pytest.mark.parametrize("base", BASES)
    def test_it_adds_the_change_of_the_weight_whatever_the_geometry(self, base):
        """Against the model whose weights have been changed."""
        model = ConvNet().double()
        before = {n: kernel(model, n).clone() for n in conv_targets(model)}
        expected = copy.deepcopy(model)
        attached = attached_to(model, base)
        learn(attached)
        for scale in (1.0, 0.4):
            for name, layer in paired_layers(attached).items():
                P, Q = (factor.detach().double() for factor in layer.change("default"))
                weight = kernel(expected, name)
                weight.copy_(before[name] + scale * (P @ Q).view_as(weight))
            with scaled(attached, scale):
                assert relative(out(attached), out(expected)) < 1e-9

    @pytest.mark.parametrize("base", BASES)
    def test_merging_and_back(self, base):
        attached = attached_to(ConvNet(), base)
        learn(attached)
        expected = out(attached)
        weights = copy.deepcopy(attached.state_dict())
        attached.merge_adapter(safe_merge=True)
        assert relative(out(attached), expected) < 1e-5
        attached.unmerge_adapter()
        assert all(torch.equal(v, weights[k]) for k, v in attached.state_dict().items())

    def test_a_change_of_memory_format_while_attached(self):
        attached = attached_to(ConvNet())
        learn(attached)
        expected = out(attached)
        attached.to(memory_format=torch.channels_last)
        x = make_images().to(memory_format=torch.channels_last)
        assert relative(out(attached, x), expected) < 1e-5

    @pytest.mark.parametrize("base", BASES)
    def test_a_step_s_gradients_are_those_of_peft_s_own(self, base):
        """PEFT's, over the residual weight and from the same factors, is the same function of them."""
        model = PlainConvNet()
        theirs_base = copy.deepcopy(model)
        ours = attached_to(model, base)
        pairs = {name: layer.pair("default") for name, layer in paired_layers(ours).items()}
        learn(ours)
        with torch.no_grad():
            for name, (B0, A0) in pairs.items():
                weight = kernel(theirs_base, name)
                weight.sub_((B0 @ A0).view_as(weight))
        config = LoraConfig(**lora_targets(dict.fromkeys(pairs, 3)), init_lora_weights=False)
        theirs: Any = get_peft_model(theirs_base, config)
        x, losses = make_images(), []
        with torch.no_grad():
            for name, layer in paired_layers(ours).items():
                other = theirs.base_model.model.get_submodule(name)
                for mine, yours in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
                    yours["default"].weight.copy_(mine["default"].weight)
        for model in (ours, theirs):
            loss = model(x).square().mean()
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        mine = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
        yours = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
        assert mine.keys() == yours.keys()
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, yours[name], rtol=1e-3, atol=1e-6)


class TestNormalizations:
    def test_frozen_ones_keep_their_statistics_in_training_mode(self, tiny_resnet):
        before = {n: b.clone() for n, b in tiny_resnet.named_buffers()}
        expected = embed(tiny_resnet)
        attached = attached_to(tiny_resnet, targets=None, roles="conv", rank=2)
        attached.train()
        assert attached.training
        assert all(m.training for m in attached.modules() if not isinstance(m, nn.BatchNorm2d))
        assert relative(embed(attached), expected) < 1e-5
        assert all(torch.equal(b, before[n]) for n, b in restore(attached).named_buffers())


class TestFiles:
    @pytest.mark.parametrize("base", BASES)
    def test_saved_and_loaded_again(self, base, tmp_path):
        attached = attached_to(ConvNet(), base)
        learn(attached)
        expected = out(attached)
        attached.save_pretrained(str(tmp_path))
        again = load_adapter(ConvNet(), tmp_path)
        if base == "untouched":
            assert torch.equal(out(again), expected)
        assert relative(out(again), expected) < 1e-5

    def test_recompressed_to_a_rank_it_is_near(self, tmp_path):
        attached = attached_to(PlainConvNet())
        learn(attached, 0.02)
        expected, start = out(attached), out(PlainConvNet())
        folder = export_adapter(attached, tmp_path / "lora", rank=4)
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
        plain = PeftModel.from_pretrained(PlainConvNet(), str(folder))
        assert (out(plain) - expected).norm() < 0.3 * (expected - start).norm()

    def test_what_a_tool_trained_from_an_export_comes_home(self, tiny_resnet, tmp_path):
        original, before = copy.deepcopy(tiny_resnet), embed(tiny_resnet)
        attached = attached_to(tiny_resnet, targets=None, roles="conv", rank=2)
        folder = export_adapter(attached, tmp_path / "start", format="residual")
        from corda_vlm.families import load_model

        tool = PeftModel.from_pretrained(
            load_model(folder / "base").model, str(folder), is_trainable=True
        )
        learn(tool, 0.3)
        tool.save_pretrained(str(tmp_path / "trained"))
        home = import_adapter(original, trained=tmp_path / "trained", start=folder)
        assert relative(embed(home), embed(tool)) < 1e-4
        with scaled(home, 0.0):
            assert relative(embed(home), before) < 1e-4

    def test_parts_of_the_attention_pool_are_for_merged_exports(self, tiny_resnet, tmp_path):
        attached = attached_to(tiny_resnet, targets=None, towers="vision", rank=2)
        learn(attached, 0.3)
        expected = embed(attached)
        with pytest.raises(CordaError, match=r"visual\.attnpool\.k_proj.*format='merged'"):
            export_adapter(attached, tmp_path / "lora")
        merged = export_adapter(attached, tmp_path / "merged", format="merged")
        from corda_vlm.families import load_model

        assert relative(embed(load_model(merged).model), expected) < 1e-4


class TestWhatPeftDoesNotKnow:
    def test_methods_of_peft_are_refused(self):
        with pytest.raises(CordaError, match=r"knows no dilation, which 'body\.dilated' has"):
            prepare_method("lora", ConvNet(), rank=2, targets=["body.dilated"])
        model = ConvNet()
        with pytest.raises(CordaError, match=r"knows no padding_mode, which 'body\.reflected' has"):
            prepare_method("dora", model, rank=2, targets=["body.reflected"])
        assert isinstance(model.get_submodule("body.reflected"), nn.Conv2d)  # taken back

    @pytest.mark.parametrize("name", ["eva", "mica"])
    def test_starts_that_peft_has_for_linear_layers_alone(self, name, tiny_resnet):
        from tests.methods.test_gradient_starts import made_from

        request = {"rank": 2, "roles": "conv"}
        if name == "eva":
            request["store"] = made_from(tiny_resnet)["store"]
            request["towers"] = "vision"
        with pytest.raises(CordaError, match=f"PEFT starts '{name}' for nn.Linear alone"):
            prepare_method(name, tiny_resnet, **request)

    def test_a_plain_lora_is_refused_and_merging_is_not(self, tmp_path):
        attached = attached_to(ConvNet())
        learn(attached)
        expected = out(attached)
        with pytest.raises(
            CordaError, match=r"a plain LoRA cannot express 2 sites.*format='merged'"
        ):
            export_adapter(attached, tmp_path / "lora")
        export_adapter(attached, tmp_path / "merged", format="merged")
        from safetensors.torch import load_file

        again = ConvNet()
        again.load_state_dict(load_file(tmp_path / "merged/model.safetensors"))
        assert relative(out(again), expected) < 1e-5
