"""The output side is the second moment of the gradients of what the model gives out, collected as covariances are."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from corda_vlm.covariance import CovarianceStore
from corda_vlm.covariance.model_output import generator_of
from corda_vlm.covariance.options import CollectOptions
from corda_vlm.errors import CalibrationError, CordaError, ForeignFileError
from corda_vlm.families import detect_family, token_masks
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.sites import find_sites, get_layer, get_linear
from tests.covariance.covariance_toy import (
    Named,
    clip_batches,
    collect,
    hook_count,
    same,
    toy,
    toy_batches,
)
from tests.covariance.test_blockwise import batches_for, make

pytestmark = pytest.mark.filterwarnings("ignore:.*have no full rank")


def same_outputs(a: CovarianceStore, b: CovarianceStore) -> bool:
    """Equal to the bit."""
    return a.outputs is not None and all(
        torch.equal(a.output_side(name).matrix, b.output_side(name).matrix)
        and a.output_side(name).count == b.output_side(name).count
        for name in a
    )


def explicit(model: nn.Module, batch: dict, data: str, number: int) -> dict[str, torch.Tensor]:
    """Site -> `Σ g gᵀ` of one batch of a CLIP, by autograd's own account."""
    family = detect_family(model)
    encode, total = family.need_contrastive(model), {}
    with unpacked(model):
        layers = {site.name: get_layer(model, site.name) for site in find_sites(model)}
        outputs: dict[str, torch.Tensor] = {}
        hooks = [
            layer.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y}))
            for name, layer in layers.items()
        ]
        embedded = [encode.encode_image(model, batch), encode.encode_text(model, batch)]
        generator, value = generator_of(data, number, 0), torch.zeros(())
        for found in embedded:
            f = F.normalize(found, dim=-1)
            value = value + (f * torch.randn(f.shape, generator=generator)).sum()
        gradients = torch.autograd.grad(value, list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            at = gradient.double().movedim(1, -1) if gradient.dim() == 4 else gradient.double()
            rows = at.reshape(-1, at.shape[-1])
            total[name] = rows.T @ rows
        for hook in hooks:
            hook.remove()
    return total


@pytest.mark.parametrize("fixture", ["tiny_clip_hf", "tiny_open_clip", "tiny_resnet"])
def test_it_is_that_of_explicit_gradients(fixture: str, request) -> None:
    model = request.getfixturevalue(fixture)
    batches = Named(clip_batches([4, 3]))
    store = collect(model, batches, output_side=True, precision="float64")
    parts = [explicit(model, batch, Named.fingerprint, n) for n, batch in enumerate(batches)]
    for name in store:
        expected = (parts[0][name] + parts[1][name]) / 7
        found = store.output_side(name)
        assert found.count == 7
        assert expected.norm() > 1e-8, name
        assert (found.matrix - expected).norm() < 1e-5 * expected.norm(), name
    without = collect(model, batches, precision="float64")
    assert all(
        torch.allclose(without[name].matrix, store[name].matrix, rtol=1e-5, atol=1e-7)
        for name in store
    )


def test_the_model_is_left_as_it_was(tiny_open_clip) -> None:
    model = tiny_open_clip
    frozen = next(model.parameters()).requires_grad_(False)
    collect(model, clip_batches([4]), output_side=True)
    assert hook_count(model) == 0
    assert all(p.requires_grad == (p is not frozen) for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_padding_has_no_part_in_it(tiny_clip_hf) -> None:
    """The same texts, padded further."""
    (batch,) = clip_batches([5])
    short = {key: batch[key] for key in ("input_ids", "attention_mask")}
    short = {key: value[:, :10] for key, value in short.items()}
    short["input_ids"][:, -1] = 99
    short["attention_mask"][:] = 1
    longer = {key: F.pad(value, (0, 2)) for key, value in short.items()}
    sites = find_sites(tiny_clip_hf, towers="text")
    a, b = (
        collect(tiny_clip_hf, Named([x]), sites, output_side=True, precision="float64")
        for x in (short, longer)
    )
    for name in a:
        one, other = a.output_side(name).matrix, b.output_side(name).matrix
        assert (one - other).norm() < 1e-5 * one.norm(), name


def test_of_a_language_model_it_is_the_fisher_information(tiny_llm) -> None:
    """Against the expectation over all next tokens, of the last layer, which sees each by itself."""
    model = tiny_llm.model
    ids = torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(0))
    batches = Named([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    sites = [site for site in find_sites(model) if site.role == "down"][-1:]
    store = collect(model, batches, sites, output_side=True, draws=400)
    name = sites[0].name
    found = store.output_side(name)
    assert found.count == 400 * 4 * 5  # the first token is no next one

    kept: list[torch.Tensor] = []
    hook = get_linear(model, name).register_forward_hook(lambda _, __, y: kept.append(y))
    logits = model(**batches[0]).logits[:, :-1]
    hook.remove()
    chances = logits.detach().softmax(-1)
    expected = torch.zeros(found.matrix.shape, dtype=torch.float64)
    for token in range(logits.shape[-1]):
        value = logits.log_softmax(-1)[:, :, token].sum()
        (gradient,) = torch.autograd.grad(value, kept[0], retain_graph=True)
        rows = gradient[:, :-1].reshape(-1, gradient.shape[-1]).double()
        expected += rows.T @ (rows * chances[:, :, token].reshape(-1, 1))
    expected /= 4 * 5
    assert (found.matrix - expected).norm() < 0.1 * expected.norm()


def test_responses_alone(tiny_llm) -> None:
    ids = torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(6) >= 4, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    store = collect(tiny_llm.model, [batch], output_side=True, tokens="response")
    assert {store.output_side(name).count for name in store} == {4 * 2}


def test_all_layers_of_a_vision_language_model() -> None:
    """Vision tower and projector are seen through the next tokens; the images' own places predict none."""
    model, batches = make("llava"), batches_for("llava")
    store = collect(model, batches, output_side=True)
    masks = [token_masks(detect_family(model), model, "text")(batch) for batch in batches]
    count = sum(int(mask["language"][:, 1:].sum()) for mask in masks)
    assert {store.output_side(name).count for name in store} == {count}
    unread = [name for name in store if not store.output_side(name).matrix.any()]
    last = max(site.block or 0 for site in store.sites if site.tower == "vision")
    # LLaVA reads the features of the layer before the last
    assert unread == [s.name for s in store.sites if s.tower == "vision" and s.block == last]


def test_draws_are_further_outputs(tiny_clip_hf) -> None:
    batches = Named(clip_batches([4]))
    one, two = (collect(tiny_clip_hf, batches, output_side=True, draws=n) for n in (1, 2))
    name = next(iter(one))
    assert (one.output_side(name).count, two.output_side(name).count) == (4, 8)
    assert not torch.equal(one.output_side(name).matrix, two.output_side(name).matrix)


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("fails_at", [1, 25])
def test_it_resumes_to_the_bit(tmp_path: Path, monkeypatch, fails_at: int, tiny_clip_hf) -> None:
    """An exception in the backward pass of the second draw of batch 1, after some of its gradients were counted."""
    from corda_vlm.covariance import SecondMoment

    model, batches = tiny_clip_hf, Named(clip_batches([4, 3, 5]))
    options: dict[str, Any] = {"output_side": True, "draws": 2, "checkpoint_share": 1.0}
    whole = collect(model, batches, **options)
    sites, add, calls = len(whole), SecondMoment.add, []
    streams = len(whole.streams)
    last = streams + 2 * sites + streams + sites + fails_at

    def failing(self: SecondMoment, *args: Any) -> None:
        calls.append(0)
        if len(calls) == last:
            raise KeyboardInterrupt
        add(self, *args)

    path = tmp_path / "c.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(SecondMoment, "add", failing)
        with pytest.raises(KeyboardInterrupt):
            collect(model, batches, path=path, **options)
    progress = CovarianceStore.load(path, unfinished=True).progress
    assert progress is not None
    assert progress.batches == 1
    resumed = collect(model, batches, path=path, **options)
    assert same(resumed, whole)
    assert same_outputs(resumed, whole)


def test_a_checkpoint_half_way_through_a_batch(tmp_path: Path, monkeypatch, tiny_clip_hf) -> None:
    """What was counted of the batch before an error is kept, and not counted again."""
    model, batches = tiny_clip_hf, Named(clip_batches([4, 3]))
    whole = collect(model, batches, output_side=True)
    path, broken = tmp_path / "c.safetensors", [True]
    block = model.vision_model.encoder.layers[0].self_attn.out_proj

    def poison(_: Any, __: Any, y: torch.Tensor) -> None:
        if broken[0] and len(y) == 3 and y.requires_grad:
            y.register_hook(lambda gradient: gradient * float("nan"))

    hook = block.register_forward_hook(poison)
    with pytest.raises(CalibrationError, match="the gradient of what the model gives out"):
        collect(model, batches, path=path, output_side=True)
    progress = CovarianceStore.load(path, unfinished=True).progress
    assert progress is not None
    assert any(key.startswith("output side of") for key in progress.ahead)
    broken[0] = False
    resumed = collect(model, batches, path=path, output_side=True)
    hook.remove()
    assert same(resumed, whole)
    assert same_outputs(resumed, whole)


def test_it_is_saved_and_added(tmp_path: Path, tiny_clip_hf) -> None:
    model, batches = tiny_clip_hf, clip_batches([4, 3])
    whole = collect(model, batches, output_side=True, precision="float64")
    loaded = CovarianceStore.load(whole.save(tmp_path / "c.safetensors"))
    assert same(loaded, whole)
    assert same_outputs(loaded, whole)
    assert "output side: " in loaded.summary()
    first, second = (
        collect(model, Named([batch]), output_side=True, precision="float64") for batch in batches
    )
    both = first + second
    onto = collect(model, Named([batches[1]]), store=first, output_side=True, precision="float64")
    name = next(iter(both))
    expected = (4 * first.output_side(name).matrix + 3 * second.output_side(name).matrix) / 7
    for summed in (both, onto):
        assert summed.output_side(name).count == 7
        assert torch.allclose(summed.output_side(name).matrix, expected, atol=1e-12)


def test_files_without_it_load_as_before(tmp_path: Path) -> None:
    """A file has a word of the output side only where it has one."""
    path = collect(toy(), toy_batches(2)).save(tmp_path / "c.safetensors")
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert not any(name.startswith("output") for name in header)
    assert "output_side" not in json.loads(header["__metadata__"]["about"])
    store = CovarianceStore.load(path)
    with pytest.raises(CordaError, match=r"no output side.*calibrate --output-side"):
        store.output_side("a")


# ------------------------------------------------------------------ bad input


def test_what_does_not_fit_is_refused(tmp_path: Path, tiny_clip_hf) -> None:
    model, batches, path = tiny_clip_hf, Named(clip_batches([4, 3])), tmp_path / "c.safetensors"
    plain = collect(model, batches, path=path)
    with pytest.raises(ForeignFileError, match="has no output side, now output_side=True"):
        collect(model, batches, path=path, output_side=True)
    with_it = tmp_path / "with.safetensors"
    full = collect(model, batches, path=with_it, output_side=True)
    with pytest.raises(ForeignFileError, match="has draws=1, now 2"):
        collect(model, batches, path=with_it, output_side=True, draws=2)
    assert collect(model, batches, path=with_it).outputs is not None  # it has what is asked for
    with pytest.raises(CalibrationError, match="one of them has no output side"):
        _ = plain + full
    with pytest.raises(CalibrationError, match="no output side; give output_side=False"):
        collect(model, batches, store=plain, output_side=True)
    with pytest.raises(CalibrationError, match="forward= has no say"):
        collect(model, batches, forward=lambda m, b: m(**b), output_side=True)
    with pytest.raises(CordaError, match="leave one of output_side and blockwise off"):
        CollectOptions(output_side=True, blockwise=True)


def test_a_model_without_known_outputs() -> None:
    with pytest.raises(CordaError, match=r"Toy has no output side.*Leave output_side out"):
        collect(toy(), toy_batches(2), output_side=True)


def test_sites_that_the_output_does_not_depend_on(tiny_clip_hf) -> None:
    model = tiny_clip_hf
    for parameter in model.visual_projection.parameters():
        parameter.data.zero_()
    sites = find_sites(model, towers="vision", roles="q")
    batch = {"pixel_values": clip_batches([4])[0]["pixel_values"]}
    store = collect(model, [batch], sites, output_side=True)
    assert all(not store.output_side(name).matrix.any() for name in store)
