"""Every way to fine-tune: the same outputs at the start, something to train, and a way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from corda_vlm.adapter import export_adapter, scaled
from corda_vlm.adapter.paired import paired_layers
from corda_vlm.covariance import collect_covariance, collect_gradient
from corda_vlm.errors import CordaError, NoSitesError, UnknownNameError
from corda_vlm.families import detect_family
from corda_vlm.families.layers.attention import is_packed
from corda_vlm.methods import METHODS, MethodRequest, prepare_method, restore_method
from corda_vlm.sites import find_sites
from tests.embeddings import make_batch

MODELS = ("tiny_clip_hf", "tiny_open_clip", "tiny_siglip")
ADAPTERS = tuple(name for name in METHODS if name not in ("full", "linear-probe"))
PLANNED = tuple(name for name, method in METHODS.items() if method.plan)
TWO_STORES = tuple(name for name, method in METHODS.items() if len(method.covariances) == 2)


def run(model: nn.Module, seed: int = 2) -> torch.Tensor:
    family, batch = detect_family(model), make_batch(seed=seed)
    batch["pixel_values"] = batch["pixel_values"].to(next(model.parameters()).dtype)
    image, text = (
        family.need_contrastive(model).encode_image(model, batch),
        family.need_contrastive(model).encode_text(model, batch),
    )
    return torch.cat([image.float().flatten(), text.float().flatten()])


@torch.no_grad()
def embed(model: nn.Module) -> torch.Tensor:
    return run(model)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def store_of(model: nn.Module, seed: int = 1):
    return collect_covariance(model, [make_batch(80, seed)], show_progress=False)


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss that both towers have a say in."""
    parts = detect_family(model).need_contrastive(model)
    batch["pixel_values"] = batch["pixel_values"].to(next(model.parameters()).dtype)
    images, texts = parts.encode_image(model, batch), parts.encode_text(model, batch)
    return (images.float() @ texts.float().T).logsumexp(1).mean()


def stores_of(name: str, model: nn.Module) -> dict:
    """The stores that a method needs, of two kinds of data, and the gradient of a loss."""
    stores = zip(METHODS[name].covariances, ("store", "task_store"), strict=False)
    given = {argument: store_of(model, seed=7 if of == "task" else 1) for of, argument in stores}
    if METHODS[name].gradient:
        batch = make_batch(16, 7)
        given["gradient"] = collect_gradient(model, [batch], loss_of, show_progress=False)
    return given


def prepare(name: str, model: nn.Module, store=None, **options) -> nn.Module:
    stores = stores_of(name, model) if store is None else {"store": store}
    return prepare_method(name, model, **{"rank": 4, "show_progress": False, **stores, **options})


def test_the_choices_are_described_with_their_source():
    assert set(METHODS) == {
        "full", "linear-probe", "lora", "dora", "eva", "mica", "pissa", "milora", "olora", "corda-kpm", "corda-ipm",
        "lora-null", "lora-null-frozen", "sc-lora", "corda-natural", "lora-ga", "keep-lora",
    }  # fmt: skip
    for name, method in METHODS.items():
        assert method.name == name
        assert method.description
        assert method.source
    assert {n: m.covariances for n, m in METHODS.items() if m.needs_store} == {
        "eva": ("task",),
        "corda-kpm": ("knowledge",),
        "corda-ipm": ("task",),
        "corda-natural": ("knowledge",),
        "keep-lora": ("knowledge",),
        "lora-null": ("knowledge",),
        "lora-null-frozen": ("knowledge",),
        "sc-lora": ("knowledge", "task"),
    }


@pytest.mark.parametrize("fixture", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_start_step_and_way_back(fixture, name, request):
    model = request.getfixturevalue(fixture)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    outputs = embed(model)
    asked = MethodRequest(rank=4, show_progress=False, **stores_of(name, model))
    prepared = METHODS[name].prepare(model, asked)
    assert relative(embed(prepared.model), outputs) < 1e-4
    parameters = [p for p in prepared.model.parameters() if p.requires_grad]
    assert prepared.trainable == sum(p.numel() for p in parameters)
    assert prepared.total == sum(p.numel() for p in prepared.model.parameters())
    if name == "linear-probe":
        assert prepared.trainable == 0
    else:
        loss = run(prepared.model, seed=3).square().sum()
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
        torch.optim.SGD(parameters, lr=1e-3).step()
        assert relative(embed(prepared.model), outputs) > 1e-6
    if name == "full":
        with pytest.raises(CordaError, match="load the model again"):
            restore_method(name, prepared.model)
        return
    bare = restore_method(name, prepared.model)
    assert bare is model
    after = bare.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(embed(bare), outputs)
    assert all(p.requires_grad for p in bare.parameters())


@pytest.mark.parametrize("name", ADAPTERS)
def test_bfloat16_trains_float32_adapters(name, tiny_open_clip):
    model = tiny_open_clip.to(torch.bfloat16)
    outputs = embed(model)
    prepared = prepare(name, model)
    assert relative(embed(prepared), outputs) < 0.05
    assert {p.dtype for p in prepared.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("name", ADAPTERS)
def test_towers_and_ranks(name, tiny_open_clip):
    sites = find_sites(tiny_open_clip, towers="text")
    prepared = prepare(name, tiny_open_clip, towers="text", rank=3)
    trained = [n for n, p in prepared.named_parameters() if p.requires_grad]
    assert trained
    assert not any("visual" in n for n in trained)
    ranks = [p.shape[0] for n, p in prepared.named_parameters() if "lora_A" in n]
    assert sum(ranks) == 3 * len(sites)
    assert set(ranks) == {3} or name == "eva"
    assert not any(is_packed(m) for m in prepared.modules())


@pytest.mark.parametrize("name", [n for n in ADAPTERS if n != "mica"])
def test_frozen_a(name, tiny_clip_hf):
    prepared = prepare(name, tiny_clip_hf, roles="up", freeze_a=True)
    trained = {n for n, p in prepared.named_parameters() if p.requires_grad}
    assert trained
    assert not any("lora_A" in n for n in trained)
    assert isinstance(prepared, PeftModel)
    prepared.set_adapter("default")
    assert {n for n, p in prepared.named_parameters() if p.requires_grad} == trained


def stir(model: nn.Module) -> None:
    """As if trained: every trainable parameter is moved."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * step.to(parameter))


@pytest.mark.parametrize("name", ADAPTERS)
def test_scaled_and_exported(name, tiny_clip_hf, tmp_path):
    outputs = embed(tiny_clip_hf)
    original = copy.deepcopy(tiny_clip_hf)
    prepared = prepare(name, tiny_clip_hf)
    stir(prepared)
    changed = embed(prepared)
    assert relative(changed, outputs) > 1e-3
    with scaled(prepared, 0.0):
        assert relative(embed(prepared), outputs) < 1e-4
    with scaled(prepared, 0.5):
        half = embed(prepared)
        assert relative(half, outputs) > 1e-4
        assert relative(half, changed) > 1e-4
    assert torch.equal(embed(prepared), changed)
    if name == "dora":  # no plain LoRA
        folder = export_adapter(prepared, tmp_path / "out", format="merged")
        assert relative(embed(type(original).from_pretrained(folder)), changed) < 1e-4
        return
    folder = export_adapter(prepared, tmp_path / "out", format="lora")
    assert relative(embed(PeftModel.from_pretrained(original, str(folder))), changed) < 1e-4


def test_full_trains_the_chosen_towers(tiny_open_clip, tiny_clip_hf):
    prepared = prepare("full", tiny_open_clip)
    assert all(p.requires_grad for p in prepared.parameters())
    prepared = prepare("full", tiny_open_clip, towers="vision")
    trained = {n for n, p in prepared.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in prepared.named_parameters() if n.startswith("visual.")}
    prepared = prepare("full", tiny_clip_hf, towers="vision")
    trained = {n for n, p in prepared.named_parameters() if p.requires_grad}
    assert trained == {
        n
        for n, _ in prepared.named_parameters()
        if n.startswith(("vision_model.", "visual_projection."))
    }


def test_lora_takes_the_seed_and_leaves_the_generator_alone(tiny_clip_hf):
    def first(seed: int) -> torch.Tensor:
        prepared = prepare("lora", tiny_clip_hf, seed=seed)
        weight = next(p.detach().clone() for n, p in prepared.named_parameters() if "lora_A" in n)
        restore_method("lora", prepared)
        return weight

    state = torch.random.get_rng_state()
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", [n for n in ADAPTERS if n not in ("dora", "mica")])
def test_a_norm(name, tiny_clip_hf):
    outputs = embed(tiny_clip_hf)
    prepared = prepare(name, tiny_clip_hf, a_norm=10.0)
    for n, p in prepared.named_parameters():
        if "lora_A" in n:
            assert torch.allclose(p.norm(dim=1), torch.tensor(10.0), rtol=1e-4)
    assert relative(embed(prepared), outputs) < 1e-4


def test_alpha_is_the_rank(tiny_clip_hf):
    for name in ADAPTERS:
        prepared = prepare(name, tiny_clip_hf)
        config: Any = prepared.peft_config["default"]
        assert config.lora_alpha == config.r == 4
        restore_method(name, prepared)


def test_kpm_and_ipm_take_opposite_ends(tiny_clip_hf):
    store = store_of(tiny_clip_hf)
    damage = {}
    for name in ("corda-kpm", "corda-ipm"):
        prepared = prepare(name, tiny_clip_hf, store)
        layer = paired_layers(prepared)["vision_model.encoder.layers.0.mlp.fc1"]
        B0, A0 = layer.pair("default")
        covariance = store["vision_model.encoder.layers.0.mlp.fc1"].matrix
        damage[name] = float((B0.double() @ A0.double() @ covariance).norm())
        restore_method(name, prepared)
    assert damage["corda-kpm"] < 0.2 * damage["corda-ipm"]


def test_refusals(tiny_clip_hf):
    with pytest.raises(UnknownNameError, match="corda-kpm"):
        prepare_method("corda", tiny_clip_hf)
    with pytest.raises(UnknownNameError):
        restore_method("corda", tiny_clip_hf)
    with pytest.raises(CordaError, match="store="):
        prepare_method("corda-kpm", tiny_clip_hf)
    with pytest.raises(NoSitesError):
        prepare_method("lora", tiny_clip_hf, towers="language")
    with pytest.raises(CordaError, match="rank 1000"):
        prepare_method("lora", tiny_clip_hf, rank=1000)
