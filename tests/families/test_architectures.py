"""Architectures that people fine-tune now, a tiny model of the real class each: layers, streams, masks, adapters, exports."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

from corda_vlm.adapter import attach_adapter, export_adapter
from corda_vlm.covariance import collect_covariance
from corda_vlm.errors import CordaError
from corda_vlm.families import FAMILIES, load_model
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import Site, find_sites, get_layer
from tests.families.architecture_processors import PROCESSORS
from tests.families.architecture_toy import SEEING_TOYS, TOYS, Toy, batch_of
from tests.families.language_toy import IMAGE, inputs_of, picture

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")


@pytest.fixture(autouse=True)
def _llama4_runs(monkeypatch):
    """Llama 4 of transformers 5.24 asks its language model for what that does not give, and stops."""
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)


def made(name: str) -> tuple[Toy, Any]:
    if name in SEEING_TOYS and transformers.__version__.startswith("4."):
        pytest.skip("vision-language models take transformers 5")
    if name == "qwen3_next" and transformers.__version__.startswith("4."):
        pytest.skip("its experts are layers there, which are no sites")
    torch.manual_seed(0)
    try:
        return TOYS[name], TOYS[name].make().eval()
    except AttributeError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")


@torch.no_grad()
def logits(model, batch):
    return model(**inputs_of(batch), use_cache=False).logits


@torch.no_grad()
def what_is_read(model: nn.Module, sites: list[Site], batch) -> dict[str, torch.Tensor]:
    """Site -> the tensor that its layer reads, kept so that no other gets its address."""
    read: dict[str, torch.Tensor] = {}
    handles = [
        get_layer(model, site.name).register_forward_pre_hook(
            lambda module, args, name=site.name: read.__setitem__(name, args[0])
        )
        for site in sites
    ]
    model(**inputs_of(batch), use_cache=False)
    for handle in handles:
        handle.remove()
    return read


def starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


@pytest.mark.parametrize("name", TOYS)
def test_from_layers_to_plain_peft(name, tmp_path):
    toy, model = made(name)
    batch = batch_of(toy, 3)
    sites = find_sites(model)
    towers = list(dict.fromkeys(site.tower for site in sites))
    found = {
        tower: (
            sum(site.tower == tower for site in sites),
            len({site.stream for site in sites if site.tower == tower}),
        )
        for tower in towers
    }
    assert found == dict(toy.streams)
    linears = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    left_out = {starred(n) for n in linears - {site.name for site in sites}}
    heard = (n for n in left_out if ".audio_tower." in n)  # of no tower that we know
    output = {n for n in left_out if n.endswith(("lm_head", "embed_out"))}
    assert left_out - {*heard} - output == toy.left_out

    # a stream is one tensor, and a tensor one stream
    dense = [site for site in sites if site.pool is None]  # of experts see test_moe.py
    read = what_is_read(model, dense, batch)
    tensors: dict[str, set[tuple[int, ...]]] = {}
    for site in dense:
        x = read[site.name]
        tensors.setdefault(site.stream, set()).add((x.data_ptr(), *x.stride()))
    assert all(len(one) == 1 for one in tensors.values())
    assert len(set.union(*tensors.values())) == len(tensors)

    store = collect_covariance(model, [batch], show_progress=False)  # which proves the streams, too
    kept = int(batch["attention_mask"].sum())
    for site in dense:
        x, layer = read[site.name], model.get_submodule(site.name)
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            continue
        # the channels of what a convolution reads come second
        features = 1 if isinstance(layer, nn.Conv2d) else -1
        rows = x.numel() // x.shape[features] if site.tower != "language" else kept
        expected = toy.rows.get(site.stream, toy.rows.get(site.tower, rows))
        assert store.counts(site.name) == [expected], site

    before, original = logits(model, batch), copy.deepcopy(model)
    plan = plan_adapter(model, store, rank=2, a_norm=1.0, show_progress=False)
    attached = attach_adapter(model, plan)
    if toy.exact:
        assert torch.equal(logits(attached, batch), before)
    torch.testing.assert_close(logits(attached, batch), before, rtol=0, atol=1e-6)
    trainable = {n: p for n, p in attached.named_parameters() if p.requires_grad}
    stacks = {site.name.rpartition(".")[0] for site in sites if site.pool is not None}
    assert len(trainable) == 2 * (len(dense) + len(stacks))
    attached(**batch).loss.backward()
    torch.optim.SGD(trainable.values(), lr=0.1).step()
    after = logits(attached, batch)
    assert not torch.allclose(after, before, atol=1e-5)
    export_adapter(attached, tmp_path / "lora", format="lora")
    plain = PeftModel.from_pretrained(original, str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(plain, batch), after, rtol=1e-3, atol=1e-4)


# What a padded batch gives has to be what the same images give without their padding: for each kind of it, a batch's fields
# and how much of them is there.
UNPADDED: dict[str, Any] = {
    "gemma4": {"pixel_values": lambda x: x[:, :16], "image_position_ids": lambda x: x[:, :16]},
    "lfm2_vl": {"pixel_values": lambda x: x[:, :16], "pixel_attention_mask": lambda x: x[:, :16]},
}


@pytest.mark.parametrize("name", UNPADDED)
def test_padding_of_images_leaves_no_trace(name):
    toy, model = made(name)
    batch = batch_of(toy, 3)
    bare = {key: UNPADDED[name].get(key, lambda x: x)(value) for key, value in batch.items()}
    batch["pixel_values"][:, 16:] = 100.0
    padded, plain = (collect_covariance(model, [one], show_progress=False) for one in (batch, bare))
    for site in padded.sites:
        torch.testing.assert_close(
            padded[site.name].matrix, plain[site.name].matrix, rtol=1e-3, atol=1e-5
        )


def test_tiles_that_are_not_there_do_not_count():
    """Mllama: the first image lacks its second tile, and each tile is padded from 17 to 24 patches."""
    toy, model = made("mllama")
    batch = batch_of(toy, 3)
    sites = [site for site in find_sites(model) if site.tower != "language" or "cross" in site.name]
    read = what_is_read(model, sites, batch)
    store = collect_covariance(model, [batch], show_progress=False)
    there = torch.tensor([True, False, True, True, True, True])
    for site in sites:
        x = read[site.name]
        if site.tower == "language" and site.role in "qo":
            x = x[batch["attention_mask"].bool()]
        else:  # (B·T, patches, d)
            x = x.reshape(6, -1, x.shape[-1])[there, :17]
        x = x.reshape(-1, x.shape[-1]).double()
        torch.testing.assert_close(
            store[site.name].matrix.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6
        )
    # the states that all cross-attention reads are those of whole images, whichever tokens are chosen
    chosen = collect_covariance(model, [batch], tokens="response", show_progress=False)
    name = "model.language_model.layers.3.cross_attn.v_proj"
    assert chosen.counts(name) == store.counts(name) == [5 * 17]


@pytest.mark.parametrize("name", ["mllama", "molmo2", "lfm2_vl", "gemma4", "qwen3_5", "qwen3_vl"])
def test_which_tokens_count(name):
    toy, model = made(name)
    batch = batch_of(toy, 3)
    images, kept = batch["input_ids"] == IMAGE, batch["attention_mask"].bool()
    wanted = {"image": images, "text": kept & ~images, "response": batch["labels"] != -100}
    vision = set()
    for tokens, mask in wanted.items():
        store = collect_covariance(model, [batch], tokens=tokens, show_progress=False)
        of = {site.tower: site.name for site in store.sites}  # the last of each
        assert store.counts(of["language"]) == [int(mask.sum())]
        vision.add((*store.counts(of["vision"]), *store.counts(of["projector"])))
    assert len(vision) == 1


# One of each kind of block; the rest are Llama's.
BLOCKWISE = (
    "cohere2", "gemma3n", "gemma4", "glm4v", "lfm2_vl", "llama4", "mllama", "molmo2", "opt", "qwen3_5", "qwen3_vl",
)  # fmt: skip


@pytest.mark.parametrize("name", BLOCKWISE)
def test_blockwise_is_the_same_or_refused(name):
    toy, model = made(name)
    batch = batch_of(toy, 3)
    options: dict[str, Any] = {"towers": "language", "show_progress": False}
    if not toy.blockwise:
        with pytest.raises(CordaError, match="leave blockwise off"):
            collect_covariance(model, [batch], blockwise=True, **options)
        return
    together = collect_covariance(model, [batch], **options)
    apart = collect_covariance(model, [batch], blockwise=True, **options)
    for site in together.sites:
        assert torch.equal(together[site.name].matrix, apart[site.name].matrix), site


@pytest.mark.parametrize("name", [*SEEING_TOYS, "lfm2", "glm4", "qwen3_next", "cohere2", "gemma4_text"])  # fmt: skip
def test_folders(name, tmp_path):
    toy, model = made(name)
    batch = batch_of(toy, 2)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded.model) is type(model)
    assert loaded.family is FAMILIES["llava" if name in SEEING_TOYS else "llm"]
    assert find_sites(loaded.model) == find_sites(model)
    torch.testing.assert_close(logits(loaded.model, batch), logits(model, batch))


# What stands for a place of an image in the ids, where it is not what stands for an image in a text
PLACES = {"molmo2": "<im_patch>"}


@pytest.mark.parametrize("name", PROCESSORS)
def test_records_become_a_batch_by_the_processor_in_the_folder(name, tmp_path):
    _, model = made(name)
    whole = PROCESSORS[name]()
    place = whole.tokenizer.convert_tokens_to_ids(PLACES.get(name, whole.image_token))
    setattr(model.config, "image_patch_id" if name == "molmo2" else "image_token_id", place)
    model.save_pretrained(tmp_path)
    whole.save_pretrained(tmp_path)
    processor: Any = load_model(tmp_path).processor
    assert processor.image_token == whole.image_token
    answers = ["A cat .", "dog", "red blue"]
    samples = []
    for answer, sizes in zip(answers, ([(60, 32)], [], [(32, 70)]), strict=True):
        text = f"{processor.image_token} " * len(sizes) + f"USER : What ? ASSISTANT : {answer}"
        span = (text.index(answer), len(text))
        samples.append(processor.encode(text, [picture(*size) for size in sizes], responses=[span]))
    right = processor.collate(samples)
    for labels, answer in zip(right["labels"], answers, strict=True):
        assert processor.tokenizer.decode(labels[labels != -100]) == answer
    left = processor.collate(samples, padding_side="left")
    together, apart = logits(model, right), logits(model, left)
    for row, sample in enumerate(samples):
        alone = logits(model, processor.collate([sample]))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(apart[row, -len(alone) :], alone, rtol=1e-3, atol=1e-4)
    store = collect_covariance(model, [right], tokens="image", show_progress=False)
    assert store.counts(store.sites[-1].name) == [int((right["input_ids"] == place).sum())]
