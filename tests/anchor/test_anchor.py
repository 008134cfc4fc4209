"""The anchor is the relative change of outputs on the knowledge, for every way to change a weight."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from corda_vlm.adapter import attach_adapter, load_adapter, scaled
from corda_vlm.adapter.paired import paired_layers
from corda_vlm.adapter.wrapped.targets import lora_targets
from corda_vlm.anchor import anchor_penalty
from corda_vlm.covariance import CovarianceStore, collect_covariance
from corda_vlm.data import load_records, make_batches
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.families import detect_family, load_model
from corda_vlm.families.layers.attention import unpack, unpacked
from corda_vlm.methods import prepare_method
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import find_sites, get_linear

MODELS = ("tiny_clip_hf", "tiny_open_clip", "tiny_siglip")


def knowledge(size: int = 128, seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 98, (size, 12), generator=generator)
    ids[:, -1] = 99
    pixels = torch.randn(size, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def store_of(model: nn.Module, sites=None) -> CovarianceStore:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few tokens for their width
        return collect_covariance(
            model, [knowledge()], sites, precision="float64", show_progress=False
        )


def effective(model: nn.Module, names) -> dict[str, torch.Tensor]:
    """The weights that the layers compute with, read off their outputs."""
    found = {}
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        for name in names:
            layer = bare.get_submodule(name).double()
            width = get_linear(model, name).in_features
            eye = torch.eye(width, dtype=torch.float64)
            found[name] = (layer(eye) - layer(torch.zeros_like(eye))).T
            layer.float()
    return found


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    with unpacked(model):
        return {
            s.name: get_linear(model, s.name).weight.detach().double().clone()
            for s in find_sites(model)
        }


def expected(before, after, store) -> dict[str, float]:
    shares = {}
    for name in after:
        C, W, D = store[name].matrix, before[name], after[name] - before[name]
        shares[name] = float(torch.trace(D @ C @ D.T) / torch.trace(W @ C @ W.T))
    return shares


def disturb(model: nn.Module, size: float = 0.02) -> None:
    """Move whatever is trained, as a training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


def agree(anchor, shares: dict[str, float], tolerance: float = 1e-4) -> None:
    report = anchor.report()
    assert report.keys() == shares.keys()
    for name, share in shares.items():
        assert report[name] == pytest.approx(share, rel=tolerance), name
    assert anchor().item() == pytest.approx(sum(shares.values()) / len(shares), rel=tolerance)
    assert anchor().item() > 1e-6


def paired(model, store, **options):
    plan = plan_adapter(model, store, rank=4, show_progress=False)
    return attach_adapter(model, plan, **options)


@pytest.mark.filterwarnings("ignore:freeze_a bounds")
@pytest.mark.parametrize("freeze_a", [False, True])
@pytest.mark.parametrize("base", ["untouched", "residual"])
@pytest.mark.parametrize("fixture", MODELS)
def test_paired_adapters(fixture, base, freeze_a, request):
    model = request.getfixturevalue(fixture)
    store, before = store_of(model), weights_of(model)
    peft_model = paired(model, store, base=base, freeze_a=freeze_a)
    anchor = anchor_penalty(peft_model, store)
    assert anchor().item() == 0.0
    disturb(peft_model)
    agree(anchor, expected(before, effective(peft_model, before), store), 1e-3)
    full = anchor().item()
    with scaled(peft_model, 0.5):
        assert anchor().item() == pytest.approx(0.25 * full, rel=1e-5)


PLAIN: dict[str, Any] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "pissa": {"init_lora_weights": "pissa", "lora_alpha": 6},
    "dora": {"use_dora": True},
    "dora, scaled": {"use_dora": True, "lora_alpha": 2},
    "dora from pissa": {"use_dora": True, "init_lora_weights": "pissa"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("fixture", MODELS[:2])
def test_adapters_of_peft(fixture, kind, request):
    model = request.getfixturevalue(fixture)
    store, before = store_of(model), weights_of(model)
    unpack(model)
    ranks = dict.fromkeys(before, 4)
    peft_model = get_peft_model(model, LoraConfig(**{**lora_targets(ranks), **PLAIN[kind]}))
    anchor = anchor_penalty(peft_model, store)
    assert anchor().item() < 1e-10
    disturb(peft_model)
    agree(anchor, expected(before, effective(peft_model, before), store), 2e-3)


@pytest.mark.parametrize("fixture", MODELS)
def test_full_fine_tuning(fixture, request):
    model = request.getfixturevalue(fixture)
    store, before = store_of(model), weights_of(model)
    prepare_method("full", model)
    exact, light = (anchor_penalty(model, store, energy=energy) for energy in (1.0, None))
    assert exact().item() == 0.0
    assert light().item() == 0.0
    disturb(model)
    shares = expected(before, weights_of(model), store)
    agree(exact, shares)
    agree(light, shares, 0.05)  # changes that no training would make
    with unpacked(model):
        agree(exact, shares)


@pytest.mark.parametrize("how", ["paired", "residual", "lora", "dora", "full"])
def test_gradients(how, tiny_open_clip):
    """Those of the explicit formula, with PEFT's own treatment of DoRA's norm."""
    model: Any = tiny_open_clip
    store, before = store_of(model), weights_of(model)
    if how in ("paired", "residual"):
        model: Any = paired(model, store, base="residual" if how == "residual" else "untouched")
    else:
        model: Any = prepare_method(how, model, rank=4)
    anchor = anchor_penalty(model, store, energy=1.0)
    disturb(model)
    anchor().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with unpacked(model):
        total = torch.zeros(())
        for name, W in before.items():
            if how == "full":
                now = get_linear(model, name).weight
            else:
                layer, eye = model.get_base_model().get_submodule(name), torch.eye(W.shape[1])
                now = (layer(eye) - layer(torch.zeros_like(eye))).T
            C, D = store[name].matrix.float(), now - W.float()
            total = total + ((D @ C) * D).sum() / float(torch.trace(W @ store[name].matrix @ W.T))
        (total / len(before)).backward()
    true = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert anchor.backward(2.0).item() == pytest.approx(anchor().item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in found:  # the same, a few layers at a time
            assert torch.allclose(parameter.grad, 2 * found[name], rtol=1e-4, atol=1e-9), name
    assert {n for n, g in true.items() if g.any()} <= found.keys()
    for name, gradient in found.items():
        off = (gradient - true[name]).norm() / true[name].norm()
        assert off < 1e-3, name


def test_it_is_the_measured_change_of_outputs(tiny_clip_hf):
    """On the calibration inputs themselves, without damping."""
    model = tiny_clip_hf
    store = store_of(model)
    peft_model: Any = prepare_method("lora", model, rank=4)
    anchor = anchor_penalty(peft_model, store)
    disturb(peft_model)
    name = find_sites(model, towers="vision", roles="up")[0].name
    inputs: list[torch.Tensor] = []
    layer: Any = peft_model.get_base_model().get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad(), peft_model.disable_adapter():  # what it was calibrated on
        detect_family(model).forward(peft_model, knowledge())
        hook.remove()
        bias = get_linear(model, name).bias
        outputs = layer(inputs[0])
    changed = layer(inputs[0])
    share = (changed - outputs).square().sum() / (outputs - bias).square().sum()
    assert anchor.report()[name] == pytest.approx(share.item(), rel=1e-4)


@pytest.mark.parametrize("fixture", MODELS[:2])
def test_a_resumed_adapter_of_ours(fixture, request, tmp_path):
    """It carries its start along, so when the anchor is built does not matter."""
    model = request.getfixturevalue(fixture)
    original = copy.deepcopy(model)
    store = store_of(model)
    trained = paired(model, store, base="residual")
    disturb(trained)
    trained.save_pretrained(str(tmp_path))
    value = anchor_penalty(trained, store)().item()
    again = load_adapter(original, tmp_path)
    assert anchor_penalty(again, store)().item() == pytest.approx(value, rel=1e-3)


def test_bfloat16_and_autocast_change_little(tiny_clip_hf):
    store = store_of(tiny_clip_hf)
    model = prepare_method("full", tiny_clip_hf)
    anchor = anchor_penalty(model, store, energy=1.0)
    disturb(model)
    value = anchor().item()
    with torch.autocast("cpu", torch.bfloat16):
        assert anchor().item() == pytest.approx(value, rel=1e-6)


def test_some_sites_and_several_adapters(tiny_clip_hf):
    model = tiny_clip_hf
    store = store_of(model)
    plan = plan_adapter(model, store, rank=4, show_progress=False, towers="vision")
    peft_model: Any = attach_adapter(model, plan)
    attach_adapter(peft_model, plan, adapter_name="second")
    peft_model.base_model.set_adapter(["default", "second"])
    before = {n: get_linear(model, n).weight.detach().double() for n in paired_layers(peft_model)}
    chosen = [site for site in find_sites(model, towers="vision") if site.role == "down"]
    anchor = anchor_penalty(peft_model, store, sites=chosen)
    disturb(peft_model)
    names = [site.name for site in chosen]
    agree(anchor, expected(before, effective(peft_model, names), store))
    assert anchor.sites == tuple(names)


def test_memory_is_shared_by_stream(tiny_clip_hf):
    store = store_of(tiny_clip_hf)
    anchor = anchor_penalty(prepare_method("lora", tiny_clip_hf, rank=2), store)
    widths = {site.stream: store[site.name].matrix.shape[0] for site in store.sites}
    assert (
        sum(4 * w**2 for w in widths.values())
        <= anchor.nbytes
        < sum(5 * w**2 for w in widths.values())
    )
    assert "sites" in repr(anchor)


def test_the_factor_is_within_a_percent_on_a_trained_model():
    """Full fine-tuning of emoji-clip on digits: covariances and changes as they are, not noise."""
    loaded = load_model("emoji-clip")
    model, sites = loaded.model, find_sites(loaded.model, towers="vision")
    known = load_records({
        "source": "parquet:model_zoo/emoji-clip/data/*.parquet", "split": "train", "limit": 64,
    })  # fmt: skip
    batches = make_batches(known, loaded.processor, batch_size=64, towers=("vision",))
    store = collect_covariance(model, batches, sites, show_progress=False)
    prepare_method("full", model, towers="vision")
    anchors = {e: anchor_penalty(model, store, energy=e) for e in (1.0, None)}
    digits = load_records({"source": "sklearn:digits", "split": "train", "limit": 32})
    batch = next(iter(make_batches(digits, loaded.processor, batch_size=32, towers=("vision",))))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(4):
        features = (
            detect_family(model).need_contrastive(model).encode_image(model, batch["pixel_values"])
        )
        classes = torch.nn.functional.normalize(features, dim=-1) @ features.detach().T
        torch.nn.functional.cross_entropy(classes, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    exact, light = (anchor().item() for anchor in anchors.values())
    assert exact > 1e-5
    assert light == pytest.approx(exact, rel=0.01)
    assert anchors[None].nbytes < 0.8 * anchors[1.0].nbytes


# ------------------------------------------------------------------ bad input


def test_nothing_adapted_is_said(tiny_clip_hf):
    store = store_of(tiny_clip_hf)
    with pytest.raises(CordaError, match="no layer of this model is adapted or trained"):
        anchor_penalty(tiny_clip_hf.requires_grad_(False), store)


@pytest.mark.parametrize("method", ["corda-kpm", "lora", "dora"])
def test_what_is_trained_whole_beside_an_adapter(method, tiny_clip_hf):
    """One linear layer, and a module that holds two."""
    store, before = store_of(tiny_clip_hf), weights_of(tiny_clip_hf)
    whole = ["visual_projection", "vision_model.encoder.layers.0.mlp"]
    model = prepare_method(
        method, tiny_clip_hf, rank=2, roles="q,v", store=store, modules_to_save=whole
    ).model
    anchor = anchor_penalty(model, store)
    disturb(model)
    seen = [name for name in before if name in anchor.sites]
    assert {"visual_projection", "vision_model.encoder.layers.0.mlp.fc2"} < set(seen)
    changed = expected({n: before[n] for n in seen}, effective(model, seen), store)
    agree(anchor, changed, 0.01)  # whole matrices have a truncated factor

    anchor.backward()
    trained = get_linear(model, "visual_projection", as_trained=True)
    assert trained is not get_linear(model, "visual_projection")
    assert trained.weight.grad is not None
    assert trained.weight.grad.abs().sum() > 0


def test_packed_attention_in_a_module_that_peft_trains_whole(tiny_open_clip):
    """The original counts as no change, also for an anchor that is made after training."""
    store = store_of(tiny_open_clip)
    block = "visual.transformer.resblocks.0"
    config = LoraConfig(r=2, target_modules=r".*resblocks\.1\.mlp\.c_fc", modules_to_save=[block])
    model = get_peft_model(tiny_open_clip, config)
    early = anchor_penalty(model, store)
    disturb(model)
    late = anchor_penalty(model, store).report()
    assert f"{block}.attn.q_proj" in late
    for name, share in early.report().items():
        if name.startswith(f"{block}."):
            assert late[name] == pytest.approx(share, rel=1e-4), name
            assert share > 1e-6


def test_a_module_that_is_not_trained_now_is_not_told_of(tiny_clip_hf, caplog):
    store = store_of(tiny_clip_hf)
    first = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["visual_projection"])
    model = get_peft_model(tiny_clip_hf, first)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("other")
    anchor = anchor_penalty(model, store)
    assert all(name.endswith("v_proj") for name in anchor.sites)
    assert "does not see" not in caplog.text


@pytest.mark.parametrize("whole", ["vision_model.post_layernorm", "visual_projection"])
def test_what_is_trained_whole_and_not_seen_is_said(whole, tiny_clip_hf, caplog):
    sites = find_sites(tiny_clip_hf, roles="q,v")
    store = store_of(tiny_clip_hf, sites)
    plan = plan_adapter(tiny_clip_hf, store, rank=4, roles="q,v", show_progress=False)
    anchor = anchor_penalty(attach_adapter(tiny_clip_hf, plan, modules_to_save=[whole]), store)
    assert set(anchor.sites) == {site.name for site in sites}
    assert f"does not see {whole}, trained whole beside the adapter" in caplog.text


@pytest.mark.parametrize("store", [None, "covariance.safetensors"])
def test_what_is_no_store_is_said(store, tiny_clip_hf):
    with pytest.raises(CordaError, match=r"needs the covariances.*collect_covariance"):
        anchor_penalty(prepare_method("lora", tiny_clip_hf, rank=2), store)


def test_adapted_layers_without_covariance(tiny_clip_hf):
    text = store_of(tiny_clip_hf, find_sites(tiny_clip_hf, towers="text"))
    both = copy.deepcopy(tiny_clip_hf)
    vision = prepare_method("lora", tiny_clip_hf, rank=2, towers="vision")
    with pytest.raises(CordaError, match=r"any of the adapted layers, 'vision_model\."):
        anchor_penalty(vision, text)
    with pytest.raises(
        CordaError, match=r"the adapted layers .*no covariance of them.*with sites="
    ):
        anchor_penalty(prepare_method("lora", both, rank=2), text)
    assert len(anchor_penalty(both, text, sites=list(text)).sites) == len(text)


def test_sites_that_do_not_fit(tiny_clip_hf):
    store = store_of(tiny_clip_hf)
    model = prepare_method("lora", tiny_clip_hf, rank=2, towers="vision")
    text = find_sites(tiny_clip_hf, towers="text")
    with pytest.raises(CordaError, match=r"not adapted, so they cannot change: 'text_model"):
        anchor_penalty(model, store, sites=text)
    with pytest.raises(CordaError, match="sites is empty"):
        anchor_penalty(model, store, sites=[])
    with pytest.raises(CordaError, match="energy is a share"):
        anchor_penalty(model, store, energy=0.0)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_a_store_of_another_model(how, tiny_clip_hf):
    store = store_of(tiny_clip_hf)
    disturb(tiny_clip_hf)
    with pytest.raises(ForeignFileError, match=r"collected from the model .*, and this one is"):
        anchor_penalty(prepare_method(how, tiny_clip_hf, rank=2), store)


def test_a_residual_base_is_known_by_its_origin(tiny_clip_hf):
    store = store_of(tiny_clip_hf)
    disturb(tiny_clip_hf)
    other = store_of(tiny_clip_hf)
    model = paired(tiny_clip_hf, other, base="residual")
    assert anchor_penalty(model, other)().item() == 0.0
    with pytest.raises(ForeignFileError):
        anchor_penalty(model, store)


def test_adapters_whose_change_is_not_known(tiny_clip_hf):
    store = store_of(tiny_clip_hf)
    model: Any = prepare_method("lora", tiny_clip_hf, rank=2)
    model.merge_adapter()
    with pytest.raises(CordaError, match=r"is merged .*unmerge_adapter"):
        anchor_penalty(model, store)
    model.unmerge_adapter()
    name = next(iter(store))
    get_linear(model, name).weight.requires_grad_(True)
    with pytest.raises(CordaError, match="has an adapter, and its base weight is trained"):
        anchor_penalty(model, store)
