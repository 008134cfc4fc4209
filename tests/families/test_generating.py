"""Every architecture that generates text, on a tiny model of its real class: layers, covariances, adapters, exports."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from corda_vlm.adapter import attach_adapter, export_adapter, load_adapter, restore
from corda_vlm.covariance import collect_covariance
from corda_vlm.errors import CordaError, NoSitesError
from corda_vlm.families import TOKENS, detect_family
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.layers.conv1d import is_conv1d
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import find_sites, get_linear, model_fingerprint, site_shape
from tests.families.language_toy import IMAGE, LANGUAGE, VLM, batch_for, inputs_of, make

# Few tokens on wide layers are enough here, and warn.
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")
NAMES = (*LANGUAGE, *VLM)

# tower -> (sites of a block, streams of a block); two blocks each
BLOCK: dict[str, Any] = {"phi": (6, 3), "phi3": (4, 4), "gpt2": (4, 4)}
VISION_BLOCK: dict[str, Any] = {"qwen2_vl": (4, 4), "qwen2_5_vl": (5, 4)}
PROJECTOR: dict[str, Any] = {"gemma3": 0, "paligemma": 1, "idefics3": 1, "smolvlm": 1}


@pytest.fixture(scope="module")
def models():
    made: dict[str, nn.Module] = {}
    return lambda name: made.setdefault(name, make(name))


@torch.no_grad()
def logits(model, batch):
    return model(**inputs_of(batch), use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_sites(models, name):
    model = models(name)
    sites = find_sites(model)
    assert detect_family(model).name == ("llm" if name in LANGUAGE else "llava")
    found = {
        tower: (
            sum(site.tower == tower for site in sites),
            len({site.stream for site in sites if site.tower == tower}),
        )
        for tower in ("vision", "projector", "language")
    }
    expected = {"language": tuple(2 * n for n in BLOCK.get(name, (7, 4)))}
    if name in VLM:
        expected["vision"] = tuple(2 * n for n in VISION_BLOCK.get(name, (6, 4)))
        expected["projector"] = (PROJECTOR.get(name, 2),) * 2
    assert found == {"vision": (0, 0), "projector": (0, 0), **expected}
    # all that is left out is the output layer
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}
    assert linears - {site.name for site in sites} == {"lm_head"}
    for tower in ("vision", "language"):
        blocks = [s for s in sites if s.tower == tower]
        assert {s.block for s in blocks} == ({0, 1} if blocks else set())
        by_role = {s.role: s for s in blocks if s.block == 1}
        for together in (("q", "k", "v"), ("gate", "up")):
            here = [by_role[role].stream for role in together if role in by_role]
            assert len(set(here)) <= 1
    towers = {site.tower for site in sites}
    for tower in towers:
        assert {s.tower for s in find_sites(model, towers=tower)} == {tower}
    if "projector" not in towers:
        with pytest.raises(NoSitesError, match="has no projector tower"):
            find_sites(model, towers="projector")


def literal(name, model, batch, sites):
    """Second moments of the layers' inputs, by their definition."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    with unpacked(model), torch.no_grad():
        for site in sites:
            layer = get_linear(model, site.name)
            handles.append(
                layer.register_forward_pre_hook(
                    lambda module, args, name=site.name: seen.setdefault(name, []).append(args[0].clone())
                )
            )  # fmt: skip
        model(**inputs_of(batch))
        for handle in handles:
            handle.remove()
    moments = {}
    for site in sites:
        (x,) = seen[site.name]
        if site.tower == "language":
            x = x[batch["attention_mask"].bool()]
        elif site.tower == "vision" and "pixel_attention_mask" in batch:
            keep = torch.ones(x.shape[:2], dtype=torch.bool)
            keep[0, 12:] = False  # three of four rows of four patches are the first image's
            x = x[keep]
        x = x.reshape(-1, x.shape[-1]).double()
        moments[site.name] = x.T @ x / len(x)
    return moments


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_covariances_are_those_of_the_tokens_that_are_no_padding(models, name, size):
    model, batch = models(name), batch_for(name, size)
    sites = find_sites(model)
    store = collect_covariance(model, [batch], sites, show_progress=False)
    for site, expected in literal(name, model, batch, sites).items():
        torch.testing.assert_close(store[site].matrix.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_vl", "idefics3"])
def test_which_tokens_count(models, name):
    model, batch = models(name), batch_for(name, 3)
    ids, kept, learnt = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"] != -100
    wanted = {
        "all": kept,
        "prompt": kept & ~learnt,
        "response": learnt,
        "image": ids == IMAGE,
        "text": kept & (ids != IMAGE),
    }
    counts = {}
    for tokens in TOKENS:
        if tokens == "image" and name == "llama":
            with pytest.raises(CordaError, match="reads text alone"):
                collect_covariance(model, [batch], show_progress=False, tokens=tokens)
            continue
        store = collect_covariance(model, [batch], show_progress=False, tokens=tokens)
        for site in store.sites:
            counts.setdefault(site.tower, set()).update(
                [(tokens, *store.counts(site.name))] if site.tower == "language" else [store.counts(site.name)[0]]
            )  # fmt: skip
    assert dict(counts["language"]) == {
        tokens: int(wanted[tokens].sum()) for tokens in dict(counts["language"])
    }
    assert all(len(found) == 1 for tower, found in counts.items() if tower != "language")
    with pytest.raises(CordaError, match="'response' needs labels"):
        collect_covariance(model, [inputs_of(batch)], show_progress=False, tokens="response")


def test_tokens_tell_calibrations_apart(models, tmp_path):
    model, batch = models("llama"), batch_for("llama", 3)
    path = tmp_path / "c.safetensors"
    collect_covariance(model, [batch], show_progress=False, path=path)
    with pytest.raises(CordaError):
        collect_covariance(model, [batch], show_progress=False, path=path, tokens="prompt")
    with pytest.raises(CordaError, match="not both"):
        collect_covariance(model, [batch], masks=lambda batch: {}, tokens="prompt")


def test_clip_has_no_choice_of_tokens(tiny_clip_hf, batch):
    with pytest.raises(CordaError, match="tokens='image' is for models that generate text"):
        collect_covariance(tiny_clip_hf, [batch], tokens="image")


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_from_start_to_export(name, tmp_path):
    model, batch = make(name), batch_for(name, 2)
    before, fingerprint = logits(model, batch), model_fingerprint(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    original = copy.deepcopy(model)
    store = collect_covariance(model, [batch_for(name, 3)], show_progress=False)
    # a_norm, as inputs of random models are far apart in scale, and the step has to suit all of them
    plan = plan_adapter(model, store, rank=2, a_norm=1.0, show_progress=False)
    attached = attach_adapter(model, plan)
    assert torch.equal(logits(attached, batch), before)
    assert model_fingerprint(attached) == fingerprint

    trainable = {n for n, p in attached.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_A." in n or ".lora_B." in n for n in trainable)
    held = {n: p.detach().clone() for n, p in attached.named_parameters()}
    optimiser = torch.optim.SGD([p for p in attached.parameters() if p.requires_grad], lr=0.1)
    attached(**batch).loss.backward()
    optimiser.step()
    moved = {n for n, p in attached.named_parameters() if not torch.equal(p, held[n])}
    assert moved
    assert moved <= trainable
    assert {s.site.tower for s in plan.sites} == {s.tower for s in find_sites(attached)}
    after = logits(attached, batch)
    assert not torch.allclose(after, before, atol=1e-5)

    close = {"rtol": 1e-3, "atol": 1e-4}
    export_adapter(attached, tmp_path / "merged", format="merged")
    merged: Any = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, batch), after, **close)
    export_adapter(attached, tmp_path / "lora", format="lora")
    plain = PeftModel.from_pretrained(original, str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(plain, batch), after, **close)
    attached.save_pretrained(tmp_path / "ours")

    bare = restore(attached)
    assert bare is model
    assert bare.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in bare.state_dict().items())
    assert torch.equal(logits(bare, batch), before)
    assert model_fingerprint(bare) == fingerprint
    again = load_adapter(bare, tmp_path / "ours")
    torch.testing.assert_close(logits(again, batch), after, rtol=1e-5, atol=1e-6)


def test_a_tower_is_adapted_alone(tmp_path):
    model, batch = make("llava"), batch_for("llava", 2)
    plan = plan_adapter(
        model, None, method="pissa", rank=2, towers="language,projector", show_progress=False
    )
    attached = attach_adapter(model, plan)
    wrapped = {n for n, m in attached.named_modules() if n.endswith(".base_layer")}
    assert not any("vision_tower" in n for n in wrapped)
    assert len(wrapped) == 14 + 2
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    after = logits(attached, batch)
    export_adapter(attached, tmp_path / "lora")
    plain = PeftModel.from_pretrained(make("llava"), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(plain, batch), after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("base", ["untouched", "residual"])
def test_the_projector_is_trained_whole(tmp_path, base):
    projector = "model.multi_modal_projector"
    model, batch = make("llava"), batch_for("llava", 2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before, fingerprint = logits(model, batch), model_fingerprint(model)
    plan = plan_adapter(model, None, method="pissa", rank=2, towers="language", show_progress=False)
    attached = attach_adapter(model, plan, base=base, modules_to_save=[projector])
    torch.testing.assert_close(logits(attached, batch), before, rtol=1e-3, atol=1e-4)
    assert len(find_sites(attached)) == len(find_sites(make("llava")))
    trainable = {n for n, p in attached.named_parameters() if p.requires_grad and "lora_" not in n}
    assert len(trainable) == 4
    assert all("multi_modal_projector" in n for n in trainable)
    attached(**batch).loss.backward()
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.add_(0.02)
    after = logits(attached, batch)
    close = {"rtol": 1e-3, "atol": 1e-4}
    export_adapter(attached, tmp_path / "merged", format="merged")
    merged: Any = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, batch), after, **close)
    export_adapter(attached, tmp_path / "lora", format="lora")
    plain = PeftModel.from_pretrained(make("llava"), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(plain, batch), after, **close)
    export_adapter(attached, tmp_path / "residual", format="residual")
    start: Any = type(model).from_pretrained(tmp_path / "residual" / "base").eval()
    plain = PeftModel.from_pretrained(start, str(tmp_path / "residual")).eval()
    torch.testing.assert_close(logits(plain, batch), after, **close)
    attached.save_pretrained(tmp_path / "ours")
    bare = restore(attached)
    assert bare.state_dict().keys() == state.keys()
    if base == "untouched":
        assert all(torch.equal(value, state[key]) for key, value in bare.state_dict().items())
        assert model_fingerprint(bare) == fingerprint
        assert all(p.requires_grad for p in bare.parameters())
    again = load_adapter(make("llava"), tmp_path / "ours")
    torch.testing.assert_close(logits(again, batch), after, **close)


def test_what_cannot_be_trained_whole():
    model = make("llava")
    plan = plan_adapter(model, None, method="pissa", rank=2, show_progress=False)
    for name, reason in (
        (
            "multi_modal_projector",
            "has no module 'multi_modal_projector'; give the dotted path in full",
        ),
        ("model.multi_modal_projector", "has an adapter in the plan"),
    ):
        with pytest.raises(CordaError, match=reason):
            attach_adapter(model, plan, modules_to_save=[name])
    assert not any("lora" in n for n, _ in model.named_modules())


@pytest.mark.parametrize("name", ["gpt2", "llava"])
def test_a_residual_base(name, tmp_path):
    model, batch = make(name), batch_for(name, 2)
    before = logits(model, batch)
    plan = plan_adapter(model, None, method="pissa", rank=2, show_progress=False)
    attached = attach_adapter(model, plan, base="residual")
    torch.testing.assert_close(logits(attached, batch), before, rtol=1e-3, atol=1e-4)
    export_adapter(attached, tmp_path / "out", format="residual")
    base: Any = type(model).from_pretrained(tmp_path / "out" / "base").eval()
    plain = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(plain, batch), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "llava"])
def test_calibration_computes_no_logits(models, name):
    model = models(name)

    def never(*args):
        raise AssertionError("logits were computed")

    handle = model.lm_head.register_forward_pre_hook(never)
    try:
        output: Any = detect_family(model).forward(model, batch_for(name, 2))
    finally:
        handle.remove()
    assert output.past_key_values is None


def test_gradient_checkpointing_counts_and_trains_once(models):
    model, batch = make("llama"), batch_for("llama", 3)
    plain = collect_covariance(model, [batch], show_progress=False)
    model.gradient_checkpointing_enable()
    again = collect_covariance(model, [batch], show_progress=False)
    for site in plain.sites:
        assert torch.equal(plain[site.name].matrix, again[site.name].matrix)
    attached = attach_adapter(
        model, plan_adapter(model, plain, rank=2, show_progress=False)
    ).train()
    attached.enable_input_require_grads()
    attached(**batch, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in attached.parameters() if p.requires_grad)


def test_half_precision(models):
    model, batch = make("llava").to(torch.bfloat16), batch_for("llava", 3)
    before = logits(model, batch)
    store = collect_covariance(model, [batch], show_progress=False)
    attached = attach_adapter(model, plan_adapter(model, store, rank=2, show_progress=False))
    assert torch.equal(logits(attached, batch), before)
    assert model_fingerprint(make("llava")) == model_fingerprint(attached)


def test_shapes_of_conv1d_are_those_of_a_linear_layer(models):
    model = models("gpt2")
    name = "transformer.h.0.attn.c_attn"
    assert site_shape(model, name) == (96, 32)
    with pytest.raises(NoSitesError, match=r"is a Conv1D.*unpacked"):
        get_linear(model, name)
    ids = batch_for("gpt2", 2)
    before, modules = logits(model, ids), [id(m) for m in model.modules()]
    with unpacked(model):
        assert find_sites(model) == find_sites(make("gpt2"))
        assert get_linear(model, name).weight.shape == (96, 32)
        assert torch.equal(logits(model, ids), before)
        get_linear(model, name).weight.data[0, 0] += 1
    assert [id(m) for m in model.modules()] == modules
    weight = model.get_submodule(name).weight
    assert weight.shape == (32, 96)
    assert not torch.equal(logits(model, ids), before)
    weight.data[0, 0] -= 1


def test_conv1d_moves_to_another_precision_while_unpacked():
    model, ids = make("gpt2"), batch_for("gpt2", 2)
    with unpacked(model):
        model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert logits(model, ids).dtype == torch.float64
