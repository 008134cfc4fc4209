"""Attaching, training, saving, resuming, disabling, merging and restoring, in both base modes."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from corda_vlm.adapter import adapt, attach_adapter, load_adapter, restore, scaled
from corda_vlm.adapter.paired import PairedLayer, paired_layers
from corda_vlm.adapter.paired import trained as factors_of
from corda_vlm.adapter.wrapped.targets import anchored, lora_targets
from corda_vlm.covariance import collect_covariance
from corda_vlm.errors import CordaError, ForeignFileError, UnknownNameError
from corda_vlm.families import detect_family
from corda_vlm.families.layers.attention import is_packed, unpacked
from corda_vlm.plan import AdapterPlan, plan_adapter
from corda_vlm.sites import find_sites, get_linear, model_fingerprint
from tests.embeddings import image_embeddings, make_batch

MODELS = ("tiny_clip_hf", "tiny_open_clip", "tiny_siglip")
BASES = ("untouched", "residual")
DTYPES = (torch.float32, torch.bfloat16)


@torch.no_grad()
def embed(model: nn.Module, seed: int = 2) -> torch.Tensor:
    """Both towers' embeddings of a fixed batch, in float32."""
    family, batch = detect_family(model), make_batch(seed=seed)
    dtype = next(model.parameters()).dtype
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    image, text = (
        family.need_contrastive(model).encode_image(model, batch),
        family.need_contrastive(model).encode_text(model, batch),
    )
    return torch.cat([image.float().flatten(), text.float().flatten()])


def embed_unpacked(model: nn.Module) -> torch.Tensor:
    """The same with attention unpacked, as it is while an adapter is attached: other kernels, other rounding."""
    with unpacked(model):
        return embed(model)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def plan_of(model: nn.Module, method: str = "pissa", **options) -> AdapterPlan:
    """PiSSA's pair is the largest there is: it needs no data and hides no error of the residual."""
    return plan_adapter(
        model, None, **{"rank": 4, "method": method, "show_progress": False, **options}
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same_to_the_bit(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def learn(model: nn.Module, size: float = 0.02) -> None:
    """What training does: A and B move, where they may."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter))


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=BASES)
def base(request) -> str:
    return request.param


class TestStart:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_untouched_changes_nothing_at_all(self, model, dtype):
        model.to(dtype)
        packed, before = embed(model), embed_unpacked(model)
        attached = attach_adapter(model, plan_of(model))
        assert torch.equal(embed(attached), before)
        assert relative(before, packed) < (1e-5 if dtype == torch.float32 else 0.05)

    def test_residual_changes_nothing_but_rounding(self, model):
        before = embed(model)
        assert (
            relative(embed(attach_adapter(model, plan_of(model), base="residual")), before) <= 1e-4
        )

    def test_residual_in_bfloat16_rounds(self, model):
        model.to(torch.bfloat16)
        before = embed(model)
        difference = relative(embed(attach_adapter(model, plan_of(model), base="residual")), before)
        assert 0 < difference < 0.1  # why it is not the default

    def test_calibrated_plans_too(self, model):
        store = collect_covariance(model, [make_batch(80)], show_progress=False)
        before = embed_unpacked(model)
        for mode in ("kpm", "ipm"):
            plan = plan_adapter(model, store, mode=mode, rank=4, a_norm=10.0, show_progress=False)
            attached = attach_adapter(model, plan)
            assert torch.equal(embed(attached), before)
            restore(attached)

    def test_only_a_and_b_are_trained_in_float32(self, model, base):
        attached = attach_adapter(model.to(torch.bfloat16), plan_of(model), base=base)
        trainable = {n for n, p in attached.named_parameters() if p.requires_grad}
        sites = find_sites(attached)
        assert trainable == {
            f"base_model.model.{s.name}.lora_{x}.default.weight" for s in sites for x in "AB"
        }
        for layer in paired_layers(attached).values():
            tensors = [
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                layer.lora_init_A["default"],
                layer.lora_init_B["default"],
            ]
            assert {t.dtype for t in tensors} == {torch.float32}
            assert layer.scaling["default"] == 1

    def test_gradients_reach_a_and_b(self, model, base):
        attached = attach_adapter(model, plan_of(model), base=base)
        family, batch = detect_family(model), make_batch()
        (
            family.need_contrastive(attached).encode_image(attached, batch).square().sum()
            + family.need_contrastive(attached).encode_text(attached, batch).square().sum()
        ).backward()
        for name, layer in paired_layers(attached).items():
            if name.endswith(("head.attention.q_proj", "head.attention.k_proj")):
                continue  # one query: a softmax over equal scores may have no gradient here
            factors: list[Any] = [layer.lora_A["default"], layer.lora_B["default"]]
            assert all(factor.weight.grad.abs().max() > 0 for factor in factors), name
            assert layer.base_layer.weight.grad is None

    def test_both_modes_take_the_same_steps(self, tiny_clip_hf):
        """The gradients at the start are those of `(W₀ + B A) x` in both."""
        found = []
        plan = plan_of(tiny_clip_hf)
        for mode in BASES:
            attached = attach_adapter(tiny_clip_hf, plan, base=mode)
            image_embeddings(attached, make_batch()["pixel_values"]).square().sum().backward()
            found.append({n: p.grad for n, p in attached.named_parameters() if p.grad is not None})
            restore(attached)
        assert found[0].keys() == found[1].keys()
        assert len(found[0]) > 0
        for name, gradient in found[0].items():
            assert torch.allclose(gradient, found[1][name], rtol=1e-3, atol=1e-4), name

    def test_a_small_change_survives_bfloat16_autocast(self, tiny_clip_hf):
        """`B A x − B₀A₀ x` as the difference of two products would be mostly rounding."""
        attached = attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf, roles="up"))
        learn(attached, size=1e-4)
        layer = next(iter(paired_layers(attached).values()))
        B, A = factors_of(layer, "default")
        B0, A0 = layer.pair("default")
        x = torch.randn(64, layer.in_features)
        exact = x.double() @ (B.double() @ A.double() - B0.double() @ A0.double()).T
        bare = torch.zeros(64, layer.out_features)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours = layer.lora_variant["default"].forward(
                layer, active_adapter="default", x=x, result=bare
            )
            naive = F.linear(F.linear(x, A), B) - F.linear(F.linear(x, A0), B0)
        assert (ours - exact).norm() < 0.02 * exact.norm()
        assert (naive - exact).norm() > exact.norm()


class TestTargets:
    def test_a_text_only_plan_of_open_clip_does_not_touch_visual(self, tiny_open_clip):
        attached = attach_adapter(tiny_open_clip, plan_of(tiny_open_clip, towers="text"))
        wrapped = set(paired_layers(attached))
        assert wrapped == {s.name for s in find_sites(tiny_open_clip, towers="text")}
        assert not any("visual" in name for name in wrapped)

    def test_ranks_that_differ_by_site(self, tiny_open_clip):
        model = tiny_open_clip
        store = collect_covariance(model, [make_batch(80)], show_progress=False)
        plan = plan_adapter(model, store, rank=6, dynamic_rank=True, show_progress=False)
        before = embed_unpacked(model)
        attached = attach_adapter(model, plan)
        ranks = {s.site.name: s.rank for s in plan.sites}
        assert len(set(ranks.values())) > 1
        layers = paired_layers(attached)
        assert {n: layer.r["default"] for n, layer in layers.items()} == ranks
        assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
        assert torch.equal(embed(attached), before)

    def test_patterns_are_anchored_and_escaped(self):
        names = ["transformer.resblocks.0.mlp.c_fc", "a+b.c"]
        for name in names:
            assert re.fullmatch(anchored(names), name)
        for other in (
            "visual.transformer.resblocks.0.mlp.c_fc",
            "transformerXresblocks.0.mlp.c_fc",
        ):
            assert not re.fullmatch(anchored(names), other)
        fields = lora_targets({"a.b": 4, "c.d": 4, "x.a.b": 8})
        assert fields["r"] == fields["lora_alpha"] == 4
        assert fields["rank_pattern"] == fields["alpha_pattern"] == {r"^x\.a\.b": 8}

    def test_a_mismatch_raises_and_leaves_the_model_alone(self, model, monkeypatch):
        before, packed = weights(model), [m for m in model.modules() if is_packed(m)]
        plan = plan_of(model)
        monkeypatch.setattr(
            "corda_vlm.adapter.attach.lora_targets",
            lambda ranks, **others: lora_targets(dict(list(ranks.items())[:-1]), **others),
        )
        with pytest.raises(CordaError, match=re.escape(plan.sites[-1].site.name)):
            attach_adapter(model, plan, base="residual")
        assert not any(isinstance(m, PairedLayer) for m in model.modules())
        assert [m for m in model.modules() if is_packed(m)] == packed
        assert all(p.requires_grad for p in model.parameters())
        assert before.keys() == model.state_dict().keys()
        assert all(torch.allclose(model.state_dict()[k], v, atol=1e-5) for k, v in before.items())


class TestRefusals:
    def test_another_model_or_family(self, tiny_clip_hf, tiny_siglip):
        plan = plan_of(tiny_clip_hf)
        with pytest.raises(ForeignFileError, match=r"'clip_hf'.*'siglip_hf'"):
            attach_adapter(tiny_siglip, plan)
        with torch.no_grad():
            for parameter in tiny_clip_hf.parameters():
                parameter.neg_()
        with pytest.raises(
            ForeignFileError,
            match=f"{plan.model_fingerprint}.*{model_fingerprint(tiny_clip_hf)}",
        ):
            attach_adapter(tiny_clip_hf, plan)

    def test_base_mode(self, tiny_clip_hf):
        with pytest.raises(UnknownNameError, match="residual, untouched"):
            attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf), base="other")

    def test_a_plan_without_factors(self, tiny_clip_hf):
        import dataclasses

        plan = dataclasses.replace(plan_of(tiny_clip_hf), factors={})
        with pytest.raises(CordaError, match="no factors"):
            attach_adapter(tiny_clip_hf, plan)

    def test_a_model_that_is_wrapped_already(self, tiny_clip_hf):
        plan = plan_of(tiny_clip_hf)
        attach_adapter(tiny_clip_hf, plan)
        with pytest.raises(CordaError, match="carries an adapter already"):
            attach_adapter(tiny_clip_hf, plan)

    def test_restore_wants_an_adapter(self, tiny_clip_hf):
        with pytest.raises(CordaError, match="CLIPModel"):
            restore(tiny_clip_hf)


class TestFreezeA:
    def test_only_b_is_trained_whatever_peft_does(self, tiny_clip_hf, base, tmp_path):
        attached = attach_adapter(
            tiny_clip_hf, plan_of(tiny_clip_hf, roles="q"), freeze_a=True, base=base
        )

        def trained() -> set[str]:
            return {
                n.split(".lora_")[1][0] for n, p in attached.named_parameters() if p.requires_grad
            }

        assert trained() == {"B"}
        attached.set_adapter("default")
        assert trained() == {"B"}
        with attached.disable_adapter():
            assert trained() == set()
        assert trained() == {"B"}
        attached.save_pretrained(tmp_path)
        attached.load_adapter(
            str(tmp_path), "default", is_trainable=True
        )  # as Trainer's resume does
        assert trained() == {"B"}
        restore(attached)
        again = load_adapter(tiny_clip_hf, tmp_path, is_trainable=True)
        assert {
            n.split(".lora_")[1][0] for n, p in again.named_parameters() if p.requires_grad
        } == {"B"}

    def test_warns_where_the_basis_cannot_help(self, tiny_clip_hf):
        with pytest.warns(UserWarning, match=r"fc2.*32×64"):
            restore(attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf), freeze_a=True))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf, roles="up"), freeze_a=True)


class TestDisableAndRestore:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_untouched_gives_the_original_back_to_the_bit(self, model, dtype, caplog):
        model.to(dtype)
        model.logit_scale.requires_grad_(False)
        before, outputs, unpacked_outputs = weights(model), embed(model), embed_unpacked(model)
        attached = attach_adapter(model, plan_of(model))
        learn(attached)
        assert relative(embed(attached), outputs) > 1e-3
        with attached.disable_adapter():
            assert torch.equal(embed(attached), unpacked_outputs)
        with caplog.at_level(logging.INFO):
            bare = restore(attached)
        assert bare is model
        assert same_to_the_bit(bare, before)
        assert torch.equal(embed(bare), outputs)
        assert "to the bit" in caplog.text
        assert [n for n, p in bare.named_parameters() if not p.requires_grad] == ["logit_scale"]
        assert not hasattr(bare, "peft_config")

    def test_residual_gives_it_back_to_rounding(self, model, caplog):
        before, outputs = weights(model), embed(model)
        plan = plan_of(model)
        attached = attach_adapter(model, plan, base="residual")
        residual = {
            s.site.name: get_linear(attached, s.site.name).weight.clone() for s in plan.sites
        }
        learn(attached)
        with attached.disable_adapter():
            assert relative(embed(attached), outputs) > 1e-2  # W₀, not W
        with caplog.at_level(logging.INFO):
            bare = restore(attached)
        assert "up to rounding" in caplog.text
        assert bare.state_dict().keys() == before.keys()
        for key, tensor in before.items():
            assert torch.allclose(bare.state_dict()[key], tensor, atol=1e-6), key
        assert relative(embed(bare), outputs) < 1e-4
        attached = attach_adapter(bare, plan)
        for name, tensor in residual.items():
            factor = plan.factors[name]
            expected = get_linear(attached, name).weight - factor.B @ factor.A
            assert torch.allclose(tensor, expected, atol=1e-5)

    def test_packed_attention_comes_back(self, tiny_open_clip, base):
        packed = [m for m in tiny_open_clip.modules() if is_packed(m)]
        attached = attach_adapter(tiny_open_clip, plan_of(tiny_open_clip), base=base)
        assert not any(is_packed(m) for m in attached.modules())
        assert [m for m in restore(attached).modules() if is_packed(m)] == packed


class TestMerge:
    @pytest.mark.parametrize(("dtype", "safe"), [(torch.float32, True), (torch.bfloat16, False)])
    def test_merge_unmerge(self, model, base, dtype, safe):
        model.to(dtype)
        outputs = embed(model)
        attached = attach_adapter(model, plan_of(model), base=base)
        learn(attached)
        trained = embed(attached)
        layers: dict[str, Any] = dict(paired_layers(attached))
        under = {n: m.base_layer.weight.clone() for n, m in layers.items()}
        attached.merge_adapter(safe_merge=safe)
        assert relative(embed(attached), trained) < (1e-4 if dtype == torch.float32 else 0.1)
        attached.unmerge_adapter()
        for name, layer in paired_layers(attached).items():
            assert torch.equal(layer.base_layer.weight, under[name])
        assert torch.equal(embed(attached), trained)
        attached.merge_adapter()
        bare = restore(attached)
        if base == "untouched":
            assert torch.equal(embed(bare), outputs)
        else:
            assert relative(embed(bare), outputs) < (1e-4 if dtype == torch.float32 else 0.1)

    def test_merge_and_unload(self, model, base):
        attached = attach_adapter(model, plan_of(model), base=base)
        learn(attached)
        trained = embed(attached)
        merged = attached.merge_and_unload()
        assert type(merged) is type(model)
        assert not any(type(m).__name__.startswith("Unpacked") for m in merged.modules())
        assert relative(embed(merged), trained) < 1e-4

    def test_scaled_is_between_the_original_and_the_trained(self, tiny_clip_hf, base):
        outputs = embed(tiny_clip_hf)
        attached = attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf), base=base)
        learn(attached)
        trained = embed(attached)
        with scaled(attached, 0.0):
            assert relative(embed(attached), outputs) < 1e-4
        with scaled(attached, 0.5):
            half = embed(attached)
            changes = {n: m.get_delta_weight("default") for n, m in paired_layers(attached).items()}
            attached.merge_adapter()
            assert relative(embed(attached), half) < 1e-4
            attached.unmerge_adapter()
        assert relative(half, outputs) > 1e-3
        assert relative(half, trained) > 1e-3
        assert torch.equal(embed(attached), trained)
        if base == "untouched":
            name = next(iter(changes))
            P, Q = paired_layers(attached)[name].change("default")
            assert torch.allclose(changes[name], 0.5 * P @ Q, atol=1e-6)


class TestFiles:
    def test_reload_in_this_process(self, model, base, tmp_path):
        attached = attach_adapter(model, plan_of(model), base=base)
        learn(attached)
        trained = embed(attached)
        attached.save_pretrained(tmp_path)
        bare = restore(attached)
        for trainable in (False, True):
            loaded = load_adapter(bare, tmp_path, is_trainable=trainable)
            assert relative(embed(loaded), trained) < 1e-4
            assert any(p.requires_grad for p in loaded.parameters()) is trainable
            bare = restore(loaded)

    def test_untouched_in_bfloat16_reloads_exactly(self, model, tmp_path):
        model.to(torch.bfloat16)
        outputs = embed(model)
        attached = attach_adapter(model, plan_of(model))
        learn(attached)
        trained = embed(attached)
        attached.save_pretrained(tmp_path)
        loaded = load_adapter(restore(attached), tmp_path)
        assert torch.equal(embed(loaded), trained)
        assert torch.equal(embed(restore(loaded)), outputs)

    def test_plain_peft_in_a_new_process_fails_loudly_and_ours_is_right(
        self, tiny_clip_hf, tmp_path
    ):
        tiny_clip_hf.save_pretrained(tmp_path / "base")
        pixels = make_batch()["pixel_values"]
        expected = {"in": pixels}
        for base in BASES:
            attached = attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf), base=base)
            learn(attached)
            attached.save_pretrained(tmp_path / base)
            expected[base] = image_embeddings(attached, pixels).detach()
            restore(attached)
        torch.save(expected, tmp_path / "expected.pt")
        code = """
import sys, torch
from peft import PeftModel
from transformers import CLIPModel
load = lambda: CLIPModel.from_pretrained("base")
for folder in ("untouched", "residual"):
    try:
        PeftModel.from_pretrained(load(), folder)
    except KeyError as error:
        assert "CORDA_VLM" in str(error), error
    else:
        sys.exit("plain peft loaded it, silently wrong")
assert "corda_vlm" not in sys.modules
expected = torch.load("expected.pt", weights_only=True)
from corda_vlm.adapter import load_adapter
for folder in ("untouched", "residual"):
    for loaded in (load_adapter(load(), folder), PeftModel.from_pretrained(load(), folder)):
        with torch.no_grad():
            out = loaded.get_image_features(expected["in"])
            out = getattr(out, "pooler_output", out)  # transformers 5
        assert (out - expected[folder]).abs().max() <= 1e-4 * expected[folder].abs().max()
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr

    def test_refuses_another_model(self, tiny_clip_hf, tmp_path):
        attached = attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf))
        attached.save_pretrained(tmp_path)
        made_for = model_fingerprint(attached)
        bare = restore(attached)
        with torch.no_grad():
            for parameter in bare.parameters():
                parameter.neg_()
        with pytest.raises(ForeignFileError, match=f"{made_for}.*{model_fingerprint(bare)}"):
            load_adapter(bare, tmp_path)

    def test_refuses_what_is_not_whole(self, tiny_open_clip, tmp_path):
        model = tiny_open_clip
        attached = attach_adapter(model, plan_of(model))
        attached.save_pretrained(tmp_path)
        restore(attached)
        file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
        data, described = file.read_bytes(), config.read_text()

        def refused(match: str) -> None:
            with pytest.raises(ForeignFileError, match=match):
                load_adapter(model, tmp_path)
            assert [m for m in model.modules() if is_packed(m)]
            assert not any(isinstance(m, PairedLayer) for m in model.modules())

        file.write_bytes(data[:-50])
        refused("truncated")
        file.unlink()
        refused("no adapter weights")
        from safetensors.torch import load, save_file

        tensors = load(data)
        tensors.pop(next(k for k in tensors if "lora_init_B" in k))
        save_file(tensors, file)
        refused("lora_init_B")
        file.write_bytes(data)
        config.write_text(described[:40])
        refused("adapter")
        config.write_text(json.dumps({**json.loads(described), "peft_type": "IA3"}))
        refused("IA3")
        with pytest.raises(ForeignFileError, match="no adapter file"):
            load_adapter(model, tmp_path / "nowhere")

    def test_loads_a_plain_lora_on_packed_attention(self, tiny_open_clip, tmp_path):
        from corda_vlm.methods import prepare_method, restore_method

        attached: Any = prepare_method("lora", tiny_open_clip, rank=4)
        learn(attached)
        trained = embed(attached)
        attached.save_pretrained(tmp_path)
        loaded = load_adapter(restore_method("lora", attached), tmp_path)
        assert torch.equal(embed(loaded), trained)


class TestSeveralAdapters:
    def test_untouched_switches_and_adds(self, tiny_open_clip, tmp_path):
        model = tiny_open_clip
        outputs, packed = embed_unpacked(model), embed(model)
        attached: Any = attach_adapter(model, plan_of(model))
        learn(attached)
        first = embed(attached)
        attach_adapter(
            attached, plan_of(attached, "milora", towers="vision"), adapter_name="second"
        )
        assert torch.equal(embed(attached), first)
        attached.set_adapter("second")
        assert torch.equal(embed(attached), outputs)
        learn(attached)
        second = embed(attached)
        assert relative(second, outputs) > 1e-4
        attached.set_adapter("default")
        assert torch.equal(embed(attached), first)
        attached.base_model.set_adapter(["default", "second"])
        both = embed(attached)
        attached.merge_adapter()
        assert relative(embed(attached), both) < 1e-4
        attached.unmerge_adapter()
        attached.set_adapter("second")
        attached.delete_adapter("default")
        assert torch.equal(embed(attached), second)
        attached.save_pretrained(tmp_path)
        assert torch.equal(embed(restore(attached)), packed)
        third = load_adapter(
            attach_adapter(model, plan_of(model)), tmp_path / "second", adapter_name="again"
        )
        third.set_adapter("again")
        assert torch.equal(embed(third), second)

    def test_residual_takes_one_only(self, tiny_clip_hf):
        plan = plan_of(tiny_clip_hf)
        attached = attach_adapter(tiny_clip_hf, plan, base="residual")
        trained = embed(attached)
        for base in BASES:
            with pytest.raises(CordaError, match="one adapter"):
                attach_adapter(attached, plan, base=base, adapter_name="second")
        assert torch.equal(embed(attached), trained)
        assert list(attached.peft_config) == ["default"]

    def test_what_would_be_silently_wrong_is_refused(self, tiny_clip_hf):
        attached = attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf))
        with pytest.raises((CordaError, ValueError), match=r"LoraConfig|peft types"):
            attached.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(CordaError, match="frozen pair"):
            attached.add_weighted_adapter(["default"], [1.0], "mixed")

    def test_deleting_a_residual_adapter_gives_the_weights_back(self, tiny_clip_hf):
        outputs = embed(tiny_clip_hf)
        attached = attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf), base="residual")
        attached.delete_adapter("default")
        assert relative(embed(attached.base_model.model), outputs) < 1e-4


class TestTrainer:
    @pytest.mark.parametrize(
        ("name", "base"), [("tiny_clip_hf", "residual"), ("tiny_open_clip", "untouched")]
    )
    def test_resume_goes_on_as_if_nothing_happened(self, name, base, request, tmp_path):
        """Four steps at once, and two, a checkpoint, a new process's model, and two more."""
        model = request.getfixturevalue(name)
        plan = plan_of(model)
        straight = self.train(attach_adapter(model, plan, base=base), tmp_path / "a", steps=4)
        bare = restore(straight["model"])
        stopped = self.train(attach_adapter(bare, plan, base=base), tmp_path / "b", steps=4, stop=2)
        checkpoint = tmp_path / "b" / "checkpoint-2"
        assert (
            json.loads((checkpoint / "adapter_config.json").read_text())["peft_type"] == "CORDA_VLM"
        )
        bare = restore(stopped["model"])
        resumed = self.train(
            attach_adapter(bare, plan, base=base), tmp_path / "b", steps=4, resume=True
        )
        for key, tensor in straight["adapter"].items():
            assert torch.allclose(resumed["adapter"][key], tensor, atol=1e-5), key
        start = plan.factors[plan.sites[0].site.name].B
        key = next(k for k in straight["adapter"] if plan.sites[0].site.name in k and "lora_B" in k)
        assert not torch.equal(straight["adapter"][key], start)
        # the last checkpoint is an adapter of ours, too
        bare = restore(resumed["model"])
        loaded = load_adapter(bare, tmp_path / "b" / "checkpoint-4")
        assert relative(embed(loaded), resumed["outputs"]) < 1e-4

    def train(
        self, attached: PeftModel, folder, *, steps: int, stop: int | None = None, resume=False
    ):
        from peft import get_peft_model_state_dict
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == stop

        class Squares(Trainer):
            def compute_loss(self, model, inputs, **kwargs):
                family = detect_family(model)
                image, text = (
                    family.need_contrastive(model).encode_image(model, inputs),
                    family.need_contrastive(model).encode_text(model, inputs),
                )
                return (image.square().mean() - 1) ** 2 + (text.square().mean() - 1) ** 2

        batch = make_batch(16)
        rows = [{k: v[i] for k, v in batch.items()} for i in range(16)]
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3,
            lr_scheduler_type="constant", save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True,
            remove_unused_columns=False, logging_strategy="no", max_grad_norm=0,
        )  # fmt: skip
        trainer = Squares(
            attached, arguments, train_dataset=rows, callbacks=[Stop()] if stop else []
        )
        trainer.train(resume_from_checkpoint=resume or None)
        state = {k: v.clone() for k, v in get_peft_model_state_dict(attached).items()}
        return {"model": attached, "adapter": state, "outputs": embed(attached.eval())}


class TestAdapt:
    def test_in_one_call(self, model):
        outputs = embed_unpacked(model)
        batches = [make_batch(80)]
        attached = adapt(
            model, batches, mode="ipm", rank=3, towers="vision", a_norm=5.0, base="untouched", show_progress=False
        )  # fmt: skip
        assert torch.equal(embed(attached), outputs)
        layers = paired_layers(attached)
        assert set(layers) == {s.name for s in find_sites(model, towers="vision")}
        for layer in layers.values():
            assert layer.r["default"] == 3
            factor: Any = layer.lora_A["default"]
            assert torch.allclose(factor.weight.norm(dim=1), torch.tensor(5.0))
        config: Any = attached.peft_config["default"]
        assert config.origin["mode"] == "ipm"

    def test_an_option_nobody_takes(self, tiny_clip_hf):
        misspelled: Any = {"dampin": 1e-2}
        with pytest.raises(UnknownNameError, match="damping"):
            adapt(tiny_clip_hf, [make_batch()], **misspelled)


def test_plain_peft_is_left_alone(tiny_clip_hf):
    """Importing us registers a peft type and changes nothing else."""
    before = embed(tiny_clip_hf)
    peft_model = get_peft_model(tiny_clip_hf, LoraConfig(target_modules=["q_proj"]))
    assert not paired_layers(peft_model)
    assert torch.equal(embed(peft_model), before)


def test_a_second_adapter_needs_a_name_of_its_own(tiny_clip_hf):
    plan = plan_adapter(tiny_clip_hf, None, method="milora", rank=2, show_progress=False)
    model = attach_adapter(tiny_clip_hf, plan)
    with pytest.raises(
        CordaError, match=r"adapter named 'default' already; restore\(model\) first"
    ):
        attach_adapter(model, plan)  # pyright: ignore[reportArgumentType]


def test_a_copy_of_an_adapter_is_the_model_that_it_copies(tiny_clip_hf):
    """As TRL's DPOTrainer makes its reference: under the same configuration, then A and B are copied."""
    outputs = embed(tiny_clip_hf)
    attached = attach_adapter(tiny_clip_hf, plan_of(tiny_clip_hf, "milora"))
    attached.add_adapter("ref", attached.peft_config["default"])
    for name, parameter in attached.named_parameters():
        if ".default." in name:
            copy = attached.get_parameter(name.replace(".default.", ".ref."))
            copy.data.copy_(parameter.data)
    with torch.no_grad():
        for layer in paired_layers(attached).values():
            B, _ = factors_of(layer, "default")
            B.add_(0.01)
    changed = embed(attached)
    assert relative(changed, outputs) > 1e-4
    attached.set_adapter("ref")
    assert torch.equal(embed(attached), outputs)
    attached.set_adapter("default")
    assert torch.equal(embed(attached), changed)
