"""Scaling after training: 0 is the model before, 1 the trained one, and in between the weights are mixed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from corda_vlm.adapter import at_scale, attach_adapter, interpolated, scaled
from corda_vlm.adapter.options import MAX_SCALE
from corda_vlm.adapter.paired import BASES
from corda_vlm.errors import CordaError
from corda_vlm.methods import METHODS, prepare_method
from corda_vlm.plan import plan_adapter

WITHOUT_DATA = tuple(
    name
    for name, method in METHODS.items()
    if not (method.needs_store or method.gradient) and name != "linear-probe"
)


def inputs(size: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 98, (size, 12), generator=generator)
    ids[:, -1] = 99
    return {"pixel_values": torch.randn(size, 3, 32, 32, generator=generator), "input_ids": ids}


@torch.no_grad()
def embed(model: nn.Module) -> torch.Tensor:
    bare: Any = model.base_model.model if isinstance(model, PeftModel) else model
    found = bare(**inputs())
    return torch.cat([found.image_embeds.flatten(), found.text_embeds.flatten()])


def learn(model: nn.Module, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def mixed(start: nn.Module, end: dict[str, torch.Tensor], scale: float) -> nn.Module:
    """A plain copy of `start` with every weight on the line to `end`."""
    model = copy.deepcopy(start)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and name in end:
                tensor.copy_(tensor + scale * (end[name] - tensor))
    return model


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_every_method_is_the_base_at_0_itself_at_1_and_mixes_weights_between(
    name: str, tiny_clip_hf: nn.Module
) -> None:
    start = copy.deepcopy(tiny_clip_hf)
    before = embed(start)
    model = prepare_method(name, tiny_clip_hf, rank=4, show_progress=False)
    learn(model, 0.1)
    after = embed(model)
    weights = weights_of(model)
    if isinstance(model, PeftModel):
        end = copy.deepcopy(model).merge_and_unload().state_dict()
    else:
        end = weights
    assert not close(after, before)

    with at_scale(model, 0.0, base=start):
        assert torch.equal(embed(model), before), "the original, to the bit"
    with at_scale(model, 1.0, base=start):
        assert torch.equal(embed(model), after)
    for scale in (0.25, 0.7, 1.5):
        with at_scale(model, scale, base=start):
            assert close(embed(model), embed(mixed(start, end, scale)))
    now = model.state_dict()
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[key], weights[key]) for key in now)
    assert torch.equal(embed(model), after)


@pytest.mark.parametrize("base", BASES)
def test_both_base_modes(base: str, tiny_clip_hf: nn.Module) -> None:
    start, before = copy.deepcopy(tiny_clip_hf), embed(tiny_clip_hf)
    plan = plan_adapter(tiny_clip_hf, None, method="pissa", rank=4, show_progress=False)
    model = attach_adapter(tiny_clip_hf, plan, base=base)
    learn(model)
    end = copy.deepcopy(model).merge_and_unload().state_dict()
    with at_scale(model, 0.0):
        assert close(embed(model), before)
        assert torch.equal(embed(model), before) == (base == "untouched")
    with at_scale(model, 0.4):
        assert close(embed(model), embed(mixed(start, end, 0.4)))


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"use_dora": True, "lora_alpha": 16},
     {"init_lora_weights": "orthogonal"}, {"lora_bias": True}],
    ids=str,
)  # fmt: skip
def test_adapters_made_by_peft(options: dict, tiny_clip_hf: nn.Module) -> None:
    start, before = copy.deepcopy(tiny_clip_hf), embed(tiny_clip_hf)
    config = LoraConfig(**{"r": 4, "target_modules": ["fc1", "q_proj"], **options})
    model = get_peft_model(tiny_clip_hf, config)
    learn(model, 0.05)
    after = embed(model)
    end = copy.deepcopy(model).merge_and_unload().state_dict()
    with scaled(model, 0.0):
        assert torch.equal(embed(model), before)
    with scaled(model, 0.5):
        assert close(embed(model), embed(mixed(start, end, 0.5)))
    assert torch.equal(embed(model), after)


def test_what_peft_alone_would_make_of_dora(tiny_clip_hf: nn.Module) -> None:
    """Why DoRA is not left to PEFT's scaling: at 0 its magnitude stays the trained one."""
    before = embed(tiny_clip_hf)
    model = prepare_method("dora", tiny_clip_hf, rank=4, show_progress=False)
    learn(model, 0.1)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] = 0.0
    assert not close(embed(model), before)


def test_a_scaled_dora_is_not_merged_whole_by_mistake(tiny_clip_hf: nn.Module) -> None:
    model = prepare_method("dora", tiny_clip_hf, rank=4, show_progress=False)
    with scaled(model, 0.5), pytest.raises(CordaError, match=r"leave the scaled\(\) block"):
        model.merge_adapter()  # pyright: ignore[reportCallIssue]
    after = embed(model)
    model.merge_adapter()  # pyright: ignore[reportCallIssue]
    assert close(embed(model), after)


class TestFull:
    def test_norms_biases_and_embeddings_too_and_back_after_an_error(
        self, tiny_clip_hf: nn.Module
    ) -> None:
        before = weights_of(tiny_clip_hf)
        learn(tiny_clip_hf)
        trained = weights_of(tiny_clip_hf)
        with pytest.raises(RuntimeError, match="stop"), interpolated(tiny_clip_hf, before, 0.3):
            now = tiny_clip_hf.state_dict()
            for name, value in before.items():
                if value.is_floating_point():
                    assert torch.allclose(
                        now[name], value + 0.3 * (trained[name] - value), atol=1e-6
                    )
            assert not torch.equal(now["logit_scale"], trained["logit_scale"])
            raise RuntimeError("stop")
        now = tiny_clip_hf.state_dict()
        assert all(torch.equal(now[name], value) for name, value in trained.items())

    def test_packed_attention(self, tiny_open_clip: nn.Module) -> None:
        start = copy.deepcopy(tiny_open_clip)
        learn(tiny_open_clip)
        pixels = inputs()["pixel_values"]
        with torch.no_grad(), at_scale(tiny_open_clip, 0.0, base=start):
            assert torch.equal(
                tiny_open_clip.encode_image(pixels),  # pyright: ignore[reportCallIssue]
                start.encode_image(pixels),  # pyright: ignore[reportCallIssue]
            )

    def test_only_what_changed_is_copied(
        self, tiny_clip_hf: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = weights_of(tiny_clip_hf)
        changed = tiny_clip_hf.visual_projection.weight
        with torch.no_grad():
            changed.add_(1.0)  # pyright: ignore[reportCallIssue]
        sizes = []
        clone = torch.Tensor.clone
        monkeypatch.setattr(
            torch.Tensor, "clone", lambda self: sizes.append(self.numel()) or clone(self)
        )
        with interpolated(tiny_clip_hf, base, 0.5):
            pass
        assert sizes == [changed.numel()]

    def test_running_statistics_are_not_extrapolated(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
        start = copy.deepcopy(model)
        with torch.no_grad():
            model[1].running_var.fill_(0.1)  # pyright: ignore[reportCallIssue]
            model[1].num_batches_tracked.fill_(9)  # pyright: ignore[reportCallIssue]
            model[1].weight.fill_(3.0)  # pyright: ignore[reportCallIssue]
        with interpolated(model, start, 2.0):
            assert torch.allclose(model[1].running_var, torch.full((3,), 0.1))  # pyright: ignore
            assert torch.allclose(model[1].weight, torch.full((3,), 5.0))  # pyright: ignore
        with interpolated(model, start, 0.5):
            assert torch.allclose(model[1].running_var, torch.full((3,), 0.55))  # pyright: ignore

    def test_tied_weights_are_moved_once(self) -> None:
        model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
        model["b"].weight = model["a"].weight
        base = weights_of(model)
        with torch.no_grad():
            model["a"].weight.add_(1.0)  # pyright: ignore[reportCallIssue]
        with interpolated(model, base, 0.5):
            assert torch.allclose(model["b"].weight, base["a.weight"] + 0.5)  # pyright: ignore

    def test_bfloat16_is_exact_at_both_ends(self, tiny_clip_hf: nn.Module) -> None:
        model = tiny_clip_hf.to(torch.bfloat16)
        base = weights_of(model)
        learn(model, 0.3)
        with interpolated(model, base, 0.0):
            assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


class TestRefused:
    @pytest.mark.parametrize("scale", [float("nan"), -0.1, MAX_SCALE + 0.1, float("inf")])
    def test_no_scale(self, scale: float, tiny_clip_hf: nn.Module) -> None:
        with pytest.raises(CordaError, match="is not between 0"):
            at_scale(tiny_clip_hf, scale, base={})
        with pytest.raises(CordaError, match="is not between 0"), scaled(tiny_clip_hf, scale):
            pass

    def test_full_without_the_base(self, tiny_clip_hf: nn.Module) -> None:
        with pytest.raises(CordaError, match="needs the weights before training: this CLIPModel"):
            at_scale(tiny_clip_hf, 0.5)

    def test_nothing_trained(self, tiny_clip_hf: nn.Module) -> None:
        start = copy.deepcopy(tiny_clip_hf)
        with (
            pytest.raises(CordaError, match="nothing was trained"),
            at_scale(tiny_clip_hf, 0.5, base=start),
        ):
            pass
        with pytest.raises(CordaError, match="no LoRA adapter"), scaled(tiny_clip_hf, 0.5):
            pass

    def test_the_base_of_another_model(self, tiny_clip_hf: nn.Module, tiny_siglip) -> None:
        learn(tiny_clip_hf)
        with (
            pytest.raises(CordaError, match="of another model"),
            at_scale(tiny_clip_hf, 0.5, base=tiny_siglip),
        ):
            pass
        part = {"logit_scale": torch.tensor(1.0)}
        with (
            pytest.raises(CordaError, match="was trained and is not among those given"),
            at_scale(tiny_clip_hf, 0.5, base=part),
        ):
            pass
        with (
            pytest.raises(CordaError, match=r"is \(2,\) there"),
            at_scale(tiny_clip_hf, 0.5, base={"logit_scale": torch.ones(2)}),
        ):
            pass

    def test_adapters_that_changed_more(self, tiny_clip_hf: nn.Module) -> None:
        for options, told in (
            ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
            ({"bias": "lora_only"}, "trained biases"),
            ({"modules_to_save": ["visual_projection"]}, "beside the adapter"),
        ):
            config = LoraConfig(r=4, target_modules=["fc1"], **options)
            model = get_peft_model(copy.deepcopy(tiny_clip_hf), config)
            with pytest.raises(CordaError, match=told), at_scale(model, 0.5):
                pass

    def test_merged(self, tiny_clip_hf: nn.Module) -> None:
        model = prepare_method("lora", tiny_clip_hf, rank=4, show_progress=False)
        model.merge_adapter()  # pyright: ignore[reportCallIssue]
        with pytest.raises(CordaError, match="merged"), scaled(model, 0.5):
            pass
