"""Models that no family knows: the user says which layers, and the rest works as for any other, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from corda_vlm import (
    AdapterPlan,
    CordaError,
    adapt,
    attach_adapter,
    collect_covariance,
    export_adapter,
    find_sites,
    load_adapter,
    plan_adapter,
    restore,
)
from corda_vlm.errors import NoSitesError
from corda_vlm.families import any_family, detect_family
from corda_vlm.families.generic import GENERIC
from corda_vlm.methods import prepare_method, restore_method
from corda_vlm.sites import model_fingerprint, sites_table


@dataclass
class Case:
    """A model, its batches, patterns, and how many layers they mean."""

    model: nn.Module
    batches: list[Any]
    targets: list[str]
    layers: int
    output: Callable[[Any], Tensor]


def bert() -> Case:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=24, max_position_embeddings=16)  # fmt: skip
    ids = torch.randint(0, 60, (6, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask, "labels_of_mine": ids}] * 2
    targets = ["encoder.layer.*.attention.self.query", "encoder.layer.*.intermediate.dense"]
    return Case(BertModel(config).eval(), batches, targets, 4, lambda out: out.last_hidden_state)


def dinov2() -> Case:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2,
                          image_size=28, patch_size=14)  # fmt: skip
    batches = [{"pixel_values": torch.randn(8, 3, 28, 28)} for _ in range(2)]
    model = Dinov2Model(config).eval()
    return Case(model, batches, ["*.mlp.fc?"], 4, lambda out: out.last_hidden_state)


def blip2() -> Case:
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    config = Blip2Config(
        vision_config={**small, "image_size": 28, "patch_size": 14},
        qformer_config={**small, "encoder_hidden_size": 16, "vocab_size": 60},
        text_config={**small, "model_type": "opt", "vocab_size": 60, "ffn_dim": 24, "word_embed_proj_dim": 16,
                     "max_position_embeddings": 32},
        num_query_tokens=4, image_token_index=59,
    )  # fmt: skip
    ids = torch.randint(2, 50, (6, 11))
    ids[:, :4] = 59
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    batches = [
        {"pixel_values": torch.randn(6, 3, 28, 28), "input_ids": ids, "attention_mask": mask}
    ] * 2
    model = Blip2ForConditionalGeneration(config).eval()
    targets = ["vision_model.*.qkv", "qformer.*.attention.query", "language_model.*.fc1"]
    return Case(model, batches, targets, 0, lambda out: out.logits)


def timm_vit() -> Case:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    # as a DataLoader gives them: images and labels
    batches = [(torch.randn(64, 3, 32, 32), torch.zeros(64)) for _ in range(2)]
    return Case(
        model.eval(), batches, ["blocks.*.attn.qkv", "blocks.*.attn.proj"], 4, lambda out: out
    )


def timm_resnet() -> Case:
    import timm

    model = timm.create_model("test_resnet", num_classes=5).eval()
    batches = [(torch.randn(8, 3, 64, 64), torch.zeros(8)) for _ in range(2)]
    return Case(model, batches, ["layer?.0.conv?", "layer3.*.downsample.1"], 10, lambda out: out)


CASES = {
    "bert": bert,
    "dinov2": dinov2,
    "blip2": blip2,
    "timm": timm_vit,
    "convolutions": timm_resnet,
}


def run(case: Case, model: nn.Module) -> Tensor:
    batch = case.batches[0]
    if isinstance(batch, tuple):
        return case.output(model(batch[0]))
    return case.output(model(**{k: v for k, v in batch.items() if k != "labels_of_mine"}))


@pytest.mark.filterwarnings("ignore:.*streams have fewer tokens")
@pytest.mark.parametrize("name", CASES)
def test_from_layers_to_a_plain_model(name, tmp_path):
    case = CASES[name]()
    model, targets = case.model, case.targets
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = run(case, model)
    sites = find_sites(model, targets=targets)
    role = "conv" if name == "convolutions" else "linear"
    assert {(s.tower, s.role) for s in sites} == {("model", role)}
    assert all(s.stream == f"{s.name}.in" for s in sites)
    if case.layers:
        assert len(sites) == case.layers
    assert role in sites_table(model, sites)

    store = collect_covariance(
        model, case.batches, targets=targets, path=tmp_path / "c.safetensors", show_progress=False
    )
    assert set(store.site_streams) == {s.name for s in sites}
    plan = plan_adapter(model, store, targets=targets, rank=4, show_progress=False)
    assert plan.family == "generic"
    plan.save(tmp_path / "plan.json")
    plan = AdapterPlan.load(tmp_path / "plan.json", model=model)

    original = copy.deepcopy(model)
    adapted = attach_adapter(model, plan)
    with torch.no_grad():
        assert torch.equal(run(case, adapted), expected)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    run(case, adapted).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        trained = run(case, adapted)
    assert not torch.equal(trained, expected)

    adapted.save_pretrained(str(tmp_path / "adapter"))
    again = load_adapter(original, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(run(case, again), trained)
    export_adapter(adapted, tmp_path / "merged", format="merged")
    merged = loaded(name, tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(run(case, merged), trained, rtol=1e-4, atol=1e-5)

    bare = restore(adapted)
    assert {key: value.shape for key, value in bare.state_dict().items()} == {
        key: value.shape for key, value in before.items()
    }
    assert all(torch.equal(value, before[key]) for key, value in bare.state_dict().items())


def loaded(name: str, folder) -> nn.Module:
    model = CASES[name]().model
    if hasattr(model, "config"):
        return type(model).from_pretrained(folder).eval()  # type: ignore[attr-defined]
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def test_padding_does_not_count_where_the_mask_fits():
    case = bert()
    store = collect_covariance(case.model, case.batches, targets=case.targets, show_progress=False)
    (entry,) = store.entries(next(iter(store.streams)))
    assert entry.count == 2 * (6 * 9 - 4)


def test_tokens_of_another_number_than_the_masks_all_count():
    case = blip2()
    targets = ["vision_model.*.qkv"]
    store = collect_covariance(case.model, case.batches, targets=targets, show_progress=False)
    (entry,) = store.entries(next(iter(store.streams)))
    assert entry.count == 2 * 6 * 5  # four patches and the class token


def test_a_batch_may_be_a_tensor_a_tuple_or_a_mapping():
    case = timm_vit()
    images = [batch[0] for batch in case.batches]
    kinds = (
        images,
        [(x,) for x in images],
        [[x, x.sum()] for x in images],
        [{"x": x} for x in images],
    )
    stores = [
        collect_covariance(case.model, batches, targets=case.targets, show_progress=False) for batches in kinds
    ]  # fmt: skip
    first = stores[0][stores[0].sites[0].name].matrix
    for store in stores[1:]:
        assert torch.equal(store[store.sites[0].name].matrix, first)


def test_a_batch_that_the_model_takes_nothing_of_is_told():
    case = timm_vit()
    with pytest.raises(CordaError, match=r"VisionTransformer takes x, .*; the batch has: pixels"):
        collect_covariance(case.model, [{"pixels": 1}], targets=case.targets, show_progress=False)


def test_adapt_and_the_methods_take_targets():
    case = timm_vit()
    adapted = adapt(case.model, case.batches, targets="blocks.0.*", rank=2, show_progress=False)
    assert {name.split(".lora")[0] for name, p in adapted.named_parameters() if p.requires_grad} == {
        f"base_model.model.blocks.0.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }  # fmt: skip
    model = restore(adapted)
    for method in ("lora", "mica", "pissa"):
        prepared = prepare_method(
            method, model, targets=["blocks.1.*"], rank=2, show_progress=False
        )
        model = restore_method(method, prepared)
    with pytest.raises(CordaError, match="method 'full' has no targets"):
        prepare_method("full", model, targets=["blocks.1.*"])


def test_targets_narrow_the_layers_of_a_known_family(tiny_clip_hf):
    sites = find_sites(tiny_clip_hf, targets=["*.q_proj", "*.v_proj"], towers="vision")
    assert {s.role for s in sites} == {"q", "v"}
    assert {s.tower for s in sites} == {"vision"}
    assert detect_family(tiny_clip_hf) is any_family(tiny_clip_hf)


def test_a_pattern_is_like_the_whole_name_of_a_layer():
    model = bert().model
    with pytest.raises(
        NoSitesError, match=r"Did you mean 'encoder\.layer\.\d\.attention\.self\.query'"
    ):
        find_sites(model, targets=["encoder.layer.*.attention.self.qeury"])
    with pytest.raises(NoSitesError, match="has a name like 'query'"):
        find_sites(model, targets=["query"])
    with pytest.raises(CordaError, match="no target given"):
        find_sites(model, targets=[])


def test_a_model_that_no_family_knows_is_told_of_targets_in_two_lines():
    model = bert().model
    for asks in (find_sites, detect_family):
        with pytest.raises(CordaError, match="no family knows the model class") as caught:
            asks(model)
        lines = str(caught.value).splitlines()
        assert len(lines) == 2
        assert "targets=['encoder.layer.*.attention.self.query']" in lines[0]
    assert any_family(model) is GENERIC


def test_the_fingerprint_is_of_all_layers_and_of_their_weights():
    one, other = bert().model, bert().model
    assert (
        model_fingerprint(one) == model_fingerprint(copy.deepcopy(one)) != model_fingerprint(other)
    )


def test_the_fingerprint_leaves_out_what_reads_the_image_and_no_other_convolution():
    """So that files of a ViT, whose patch embedding was no site once, stay valid."""
    for case, layer, same in (
        (dinov2(), "embeddings.patch_embeddings.projection", True),
        (timm_resnet(), "conv1.0", True),
        (timm_resnet(), "layer1.0.conv2", False),
    ):
        before = model_fingerprint(case.model)
        with torch.no_grad():
            case.model.get_parameter(f"{layer}.weight").neg_()
        assert (model_fingerprint(case.model) == before) is same
        assert [s.role for s in find_sites(case.model, targets=layer)] == ["conv"]


def test_blocks_are_the_first_number_of_a_path():
    blocks = {s.name: s.block for s in find_sites(bert().model, targets="*")}
    assert blocks["encoder.layer.1.output.dense"] == 1
    assert blocks["pooler.dense"] is None
