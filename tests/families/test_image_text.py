"""MetaCLIP 2, AIMv2, TIPSv2, Chinese-CLIP, AltCLIP: layers, embeddings, adapters, one tower alone, folders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as t
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from corda_vlm.adapter import attach_adapter, export_adapter
from corda_vlm.covariance import collect_covariance
from corda_vlm.errors import CordaError
from corda_vlm.families import detect_family, load_model
from corda_vlm.families.image_text import IMAGE_TEXT_HF, logit_scale
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import find_sites
from tests.families.language_toy import picture, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {
    **_SMALL, "vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 99, "bos_token_id": 98, "pad_token_id": 1,
}  # fmt: skip
VISION = {**_SMALL, "image_size": 32, "patch_size": 8}
_BERT = {"project_dim": 32, "max_position_embeddings": 20}
# name -> configuration's name, of the text tower beside `TEXT`, of the whole, sites and streams of the vision and text tower
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[int, int], tuple[int, int]]] = {
    "metaclip_2": ("MetaClip2", {}, {"projection_dim": 24}, (13, 9), (13, 9)),
    "aimv2": ("Aimv2", {}, {"projection_dim": 24}, (2 * 7 + 3 + 1, 11), (15, 9)),
    "tipsv2": ("Tipsv2", {}, {}, (12, 8), (12, 8)),
    "chinese_clip": ("ChineseCLIP", {}, {"projection_dim": 24}, (13, 9), (13, 9)),
    "altclip": ("AltCLIP", _BERT, {"projection_dim": 24}, (13, 9), (14, 10)),
}


def make(name: str, part: str = "Model", **vision: Any) -> Any:
    prefix, text, whole, *_ = MODELS[name]
    if not hasattr(t, f"{prefix}{part}"):
        pytest.skip(f"transformers {t.__version__} has no {prefix}{part}")
    config = getattr(t, f"{prefix}Config")(
        text_config={**TEXT, **text}, vision_config={**VISION, **vision}, **whole
    )
    of = {"V": "vision_config", "T": "text_config"}.get(part[0])
    torch.manual_seed(0)
    return getattr(t, f"{prefix}{part}")(getattr(config, of) if of else config).eval()


@pytest.fixture
def batch():
    ids = torch.randint(3, 90, (3, 12))
    mask = torch.ones_like(ids)
    for row, end in enumerate((5, 8, 11)):
        ids[row, end], ids[row, end + 1 :], mask[row, end + 1 :] = 99, 1, 0
    return {
        "pixel_values": torch.randn(3, 3, 32, 32),
        "input_ids": ids,
        "attention_mask": mask,
    }


@torch.no_grad()
def similarities(model, batch):
    return model(**batch).logits_per_image


@pytest.mark.parametrize("name", MODELS)
def test_from_layers_to_plain_peft(name, batch, tmp_path):
    if name == "chinese_clip" and t.__version__.startswith("4."):
        pytest.skip("its text tower has no pooler there, which its own get_text_features asks for")
    model = make(name)
    family = detect_family(model)
    assert family is IMAGE_TEXT_HF
    sites = find_sites(model)
    counts = [
        (len(of), len({site.stream for site in of}))
        for of in ([s for s in sites if s.tower == tower] for tower in ("vision", "text"))
    ]
    assert counts == list(MODELS[name][3:])
    linears = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {site.name for site in sites} == linears

    before, original = similarities(model, batch), copy.deepcopy(model)
    contrastive = family.need_contrastive(model)
    with torch.no_grad():
        images = F.normalize(contrastive.encode_image(model, batch["pixel_values"]), dim=-1)
        texts = F.normalize(contrastive.encode_text(model, batch), dim=-1)
        scale = contrastive.logit_scale(model)
    torch.testing.assert_close(scale * images @ texts.T, before, rtol=1e-4, atol=1e-5)

    store = collect_covariance(model, [batch], show_progress=False)
    in_blocks = [s.name for s in sites if s.tower == "text" and s.block is not None]
    assert {n for name in in_blocks for n in store.counts(name)} == {6 + 9 + 12}
    attached = attach_adapter(
        model, plan_adapter(model, store, rank=2, a_norm=1.0, show_progress=False)
    )
    assert torch.equal(similarities(attached, batch), before)
    trainable = [p for p in attached.parameters() if p.requires_grad]
    loss = F.cross_entropy(attached(**batch).logits_per_image, torch.arange(3))
    loss.backward()
    torch.optim.SGD(trainable, lr=0.1).step()
    after = similarities(attached, batch)
    assert not torch.allclose(after, before, atol=1e-5)
    export_adapter(attached, tmp_path / "lora", format="lora")
    plain = PeftModel.from_pretrained(original, str(tmp_path / "lora")).eval()
    torch.testing.assert_close(similarities(plain, batch), after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_tower_alone_has_the_same_layers(name):
    whole = {s.name.partition(".")[2]: s.stream for s in find_sites(make(name), towers="vision")}
    alone = make(name, "VisionModel")
    sites = find_sites(alone)
    assert {s.tower for s in sites} == {"vision"}
    assert {s.name.removeprefix("vision_model."): s.stream for s in sites}.items() <= whole.items()
    with pytest.raises(CordaError, match="is one tower alone and has no logit scale"):
        logit_scale(alone)
    with pytest.raises(CordaError, match="has no text tower"):
        IMAGE_TEXT_HF.need_contrastive(alone).encode_text(alone, {"input_ids": torch.ones(1, 2)})


def test_the_largest_tipsv2_has_gates(batch):
    model = make("tipsv2", use_swiglu_ffn=True)
    roles = {site.role for site in find_sites(model, towers="vision")}
    assert {"gate", "up", "down"} <= roles
    collect_covariance(model, [batch], show_progress=False)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_loads_as_what_it_is(name, tmp_path, batch):
    model = make(name)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded.model) is type(model)
    assert loaded.family is IMAGE_TEXT_HF
    assert loaded.processor.image(picture(50, 40)).shape == (3, 32, 32)
    texts = loaded.processor.text(["What is this ?", "dog"])
    assert texts["attention_mask"].sum(1).tolist() == [4, 1]
    torch.testing.assert_close(similarities(loaded.model, batch), similarities(model, batch))
