"""The gradient of a task's loss: what it is, that it leaves the model alone, and that it can be stopped anywhere."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corda_vlm.covariance import GradientStore, collect_gradient
from corda_vlm.errors import CalibrationError, CordaError, ForeignFileError
from corda_vlm.families import detect_family
from corda_vlm.families.layers.attention import is_packed, unpacked
from corda_vlm.same_model import model_signs
from corda_vlm.sites import find_sites, get_linear
from tests.quantized_toy import batches as quantized_batches
from tests.quantized_toy import dequantized_copy, quantized


def make_batches(count: int = 3, size: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
            "labels": torch.randint(0, 5, (size,), generator=generator),
        }
        for _ in range(count)
    ]


def image_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of five fixed directions."""
    encode = detect_family(model).need_contrastive(model).encode_image
    features = encode(model, batch["pixel_values"]).float()
    generator = torch.Generator().manual_seed(1)
    heads = torch.randn(features.shape[1], 5, generator=generator)
    return nn.functional.cross_entropy(features @ heads, batch["labels"])


def collect(model: nn.Module, batches: list | None = None, **options) -> GradientStore:
    given = {"towers": "vision", "show_progress": False, **options}
    return collect_gradient(model, batches or make_batches(), image_loss, **given)


@pytest.mark.parametrize("name", ["tiny_clip_hf", "tiny_open_clip"])
def test_it_is_the_mean_of_the_batches_gradients(name, request):
    model = request.getfixturevalue(name)
    packed = [type(m).__name__ for m in model.modules() if is_packed(m)]
    store = collect(model)
    sites = find_sites(model, towers="vision")
    assert list(store) == [site.name for site in sites]
    with unpacked(model):
        weights = {site.name: get_linear(model, site.name).weight for site in sites}
        for weight in weights.values():
            weight.requires_grad_(True)
        for site, weight in weights.items():
            grads = [
                torch.autograd.grad(image_loss(model.eval(), batch), weight)[0]
                for batch in make_batches()
            ]
            torch.testing.assert_close(
                store[site], torch.stack(grads).mean(0), atol=1e-6, rtol=1e-4
            )
            if len(weights) > 8 and site != sites[0].name:
                break
    assert [type(m).__name__ for m in model.modules() if is_packed(m)] == packed


def test_the_model_is_left_as_it_was(tiny_clip_hf):
    model = tiny_clip_hf.train()
    frozen = next(model.parameters()).requires_grad_(False)
    given = list(model.parameters())[3]
    given.grad = torch.ones_like(given)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    needed = [p.requires_grad for p in model.parameters()]
    collect(model)
    assert model.training
    assert not frozen.requires_grad
    assert [p.requires_grad for p in model.parameters()] == needed
    assert torch.equal(given.grad, torch.ones_like(given))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_bfloat16_model_agrees(tiny_clip_hf):
    exact = collect(tiny_clip_hf)
    light = collect(tiny_clip_hf.to(torch.bfloat16), [
        {**batch, "pixel_values": batch["pixel_values"].bfloat16()} for batch in make_batches()
    ])  # fmt: skip
    for site in exact:
        assert light[site].dtype == torch.float32
        cosine = nn.functional.cosine_similarity(
            exact[site].flatten(), light[site].flatten(), dim=0
        )
        assert float(cosine) > 0.97


def test_a_language_model_returns_its_own_loss(tiny_llm):
    model = tiny_llm.model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=generator)
    store = collect_gradient(model, [{"input_ids": ids, "labels": ids}], show_progress=False)
    name = next(iter(store))
    weight = get_linear(model, name).weight
    (wanted,) = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weight)
    torch.testing.assert_close(store[name], wanted)


def test_sites_that_the_loss_does_not_reach_are_left_out_and_said(tiny_clip_hf, tmp_path, caplog):
    path = tmp_path / "gradient.safetensors"
    store = collect(tiny_clip_hf, towers=None, path=path)
    assert "does not depend on 13 of 26 weights" in caplog.text
    assert len(store) == 13
    assert len(store.asked) == 26
    assert not any(name.startswith("text_model") for name in store)
    again = collect(tiny_clip_hf, towers=None, path=path)  # finished, for all of them
    assert list(again) == list(store)
    assert "13 of 26 weight matrices" in store.summary()


@pytest.mark.parametrize("value", [None, "vector"], ids=["nothing", "a vector"])
def test_a_loss_that_is_no_number(value, tiny_clip_hf):
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        encode = detect_family(model).need_contrastive(model).encode_image
        features = encode(model, batch["pixel_values"])
        return None if value is None else features.sum(1)

    with pytest.raises(CalibrationError, match="has to give one number"):
        collect_gradient(tiny_clip_hf, make_batches(), loss, towers="vision", show_progress=False)


def test_losses_are_told_apart_by_their_names(tiny_clip_hf, tmp_path):
    def another_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return 2 * image_loss(model, batch)

    path = tmp_path / "gradient.safetensors"
    collect(tiny_clip_hf, path=path)
    with pytest.raises(ForeignFileError, match="gradient of another data"):
        collect_gradient(
            tiny_clip_hf, make_batches(), another_loss, towers="vision", path=path, show_progress=False
        )  # fmt: skip


class TestFiles:
    def test_round_trip(self, tiny_clip_hf, tmp_path):
        path = tmp_path / "gradient.safetensors"
        store = collect(tiny_clip_hf, path=path)
        again = GradientStore.load(path, model=tiny_clip_hf)
        assert (again.batches, again.complete) == (3, True)
        assert again.data_fingerprint == store.data_fingerprint
        fresh = collect(tiny_clip_hf)
        assert all(torch.equal(again[site], fresh[site]) for site in fresh)
        assert "mean of 3 batches" in again.summary()

    def test_stopped_after_any_batch_it_goes_on_to_the_bit(self, tiny_clip_hf, tmp_path):
        path = tmp_path / "gradient.safetensors"
        whole = collect(tiny_clip_hf)
        calls = 0

        def interrupted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            nonlocal calls
            calls += 1
            if calls in (1, 2):
                os.kill(os.getpid(), signal.SIGINT)
            return image_loss(model, batch)

        interrupted.__qualname__ = image_loss.__qualname__  # what a loss is known by

        for done in (1, 2):
            with pytest.raises(KeyboardInterrupt, match=f"stopped after {done} batches"):
                collect_gradient(
                    tiny_clip_hf, make_batches(), interrupted, towers="vision", path=path, show_progress=False
                )  # fmt: skip
            with pytest.raises(ForeignFileError, match=f"stopped after {done} batches"):
                GradientStore.load(path)
        store = collect_gradient(
            tiny_clip_hf, make_batches(), interrupted, towers="vision", path=path, show_progress=False
        )  # fmt: skip
        assert calls == 3
        assert all(torch.equal(store[site], whole[site]) for site in whole)

    def test_a_finished_file_runs_nothing(self, tiny_clip_hf, tmp_path):
        path = tmp_path / "gradient.safetensors"
        collect(tiny_clip_hf, path=path)

        def never(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            raise AssertionError("the model ran")

        never.__qualname__ = image_loss.__qualname__  # what a loss is known by

        again = collect_gradient(
            tiny_clip_hf, make_batches(), never, towers="vision", path=path, show_progress=False
        )
        assert again.batches == 3

    def test_what_is_another(self, tiny_clip_hf, tmp_path):
        path = tmp_path / "gradient.safetensors"
        collect(tiny_clip_hf, path=path, about="prompts")
        with pytest.raises(ForeignFileError, match="gradient of another data"):
            collect(tiny_clip_hf, path=path, about="other prompts")
        with pytest.raises(ForeignFileError, match="gradient of another data"):
            collect(tiny_clip_hf, make_batches(4), path=path, about="prompts")
        with pytest.raises(ForeignFileError, match="lacks the sites"):
            collect(tiny_clip_hf, path=path, about="prompts", towers=None)
        with torch.no_grad():
            get_linear(tiny_clip_hf, next(iter(GradientStore.load(path)))).weight.add_(1)
        with pytest.raises(ForeignFileError, match="gradient of another model"):
            collect(tiny_clip_hf, path=path, about="prompts")
        with pytest.raises(ForeignFileError, match="and this one is"):
            GradientStore.load(path, model=tiny_clip_hf)

    def test_damage(self, tiny_clip_hf, tmp_path):
        path = tmp_path / "gradient.safetensors"
        collect(tiny_clip_hf, path=path)
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        store = GradientStore.load(path)
        with pytest.raises(ForeignFileError, match="is not what was written"):
            [store[site] for site in store]
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ForeignFileError, match="truncated"):
            GradientStore.load(path)

    def test_something_else(self, tmp_path):
        from safetensors.torch import save_file

        with pytest.raises(ForeignFileError, match="no gradient of a task"):
            GradientStore.load(tmp_path / "none.safetensors")
        save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
        with pytest.raises(ForeignFileError, match="but no gradient"):
            GradientStore.load(tmp_path / "x.safetensors")


class TestRefusals:
    def test_a_loss_that_reaches_none_of_the_sites(self, tiny_clip_hf):
        with pytest.raises(CalibrationError, match="does not depend on any"):
            collect(tiny_clip_hf, towers="text")

    def test_no_batches(self, tiny_clip_hf):
        with pytest.raises(CalibrationError, match="no calibration batches"):
            collect_gradient(tiny_clip_hf, [], image_loss, show_progress=False)

    def test_a_model_without_a_loss_of_its_own(self, tiny_clip_hf):
        batch = {k: v for k, v in make_batches(1)[0].items() if k != "labels"}
        batch["input_ids"] = torch.ones(4, 8, dtype=torch.long)
        with pytest.raises(CordaError, match="pass loss="):
            collect_gradient(tiny_clip_hf, [batch], show_progress=False)

    def test_nan_names_site_and_batch(self, tiny_clip_hf):
        batches = make_batches()
        batches[1]["pixel_values"][0, 0, 0, 0] = torch.nan
        with pytest.raises(CalibrationError, match=r"gradient of .* has NaN or Inf in batch 1"):
            collect(tiny_clip_hf, batches)

    def test_a_site_that_was_not_collected(self, tiny_clip_hf):
        with pytest.raises(CordaError, match="has nothing of site 'head'"):
            _ = collect(tiny_clip_hf)["head"]


def test_of_a_quantised_model_it_is_that_of_the_dense_one():
    model = quantized("nf4")
    twin = dequantized_copy(model)
    both = [collect_gradient(m, quantized_batches(2), show_progress=False) for m in (model, twin)]
    assert list(both[0]) == list(both[1])
    for name, expected in both[1].items():
        torch.testing.assert_close(both[0][name], expected, rtol=1e-3, atol=1e-6)
    assert both[0].model_signs == model_signs(model)
    assert not any(m._forward_hooks for m in model.modules())
