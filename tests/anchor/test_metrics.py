"""Anchors in other metrics: of the model's output, of the weights alone, of the new task."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from corda_vlm.adapter.attach import lora_targets
from corda_vlm.anchor import Anchor, anchor_penalty
from corda_vlm.anchor.options import AnchorOptions
from corda_vlm.covariance import CovarianceStore, collect_covariance
from corda_vlm.errors import CordaError, ForeignFileError, UnknownNameError
from corda_vlm.families import Contrastive, Family, Rule, register_family
from corda_vlm.families.layers.attention import unpack, unpacked
from corda_vlm.methods import prepare_method
from corda_vlm.sites import find_sites, get_linear
from tests.anchor.test_anchor import disturb, knowledge, paired, store_of, weights_of

KINDS = ("paired", "residual", "lora", "dora", "dora from pissa", "full")


def felt_store(model: nn.Module, seed: int = 5) -> CovarianceStore:
    """With the output side."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few tokens for their width
        batch = knowledge(16, seed)
        return collect_covariance(
            model, [batch], precision="float64", output_side=True, show_progress=False
        )


def prepared(how: str, model: nn.Module, store: CovarianceStore) -> Any:
    if how in ("paired", "residual"):
        return paired(model, store, base="residual" if how == "residual" else "untouched")
    if how == "dora from pissa":
        unpack(model)
        ranks = dict.fromkeys(store, 4)
        options: dict[str, Any] = {"use_dora": True, "init_lora_weights": "pissa"}
        return get_peft_model(model, LoraConfig(**{**lora_targets(ranks), **options}))
    return prepare_method(how, model, rank=4)


def weight_now(model: Any, name: str, how: str) -> torch.Tensor:
    """What the layer computes with, differentiable."""
    if how == "full":
        return get_linear(model, name).weight
    layer, width = model.get_base_model().get_submodule(name), get_linear(model, name).in_features
    eye = torch.eye(width)
    return (layer(eye) - layer(torch.zeros_like(eye))).T


def dense(model: Any, before, store: CovarianceStore, how: str, output_side: str) -> torch.Tensor:
    """`Σ tr(G ΔW C ΔWᵀ)` written out."""
    total = torch.zeros(())
    for name, W in before.items():
        change = weight_now(model, name, how) - W.float()
        C, G = store[name].matrix.float(), store.output_side(name).matrix.float()
        if output_side == "mean":
            G = torch.eye(len(G)) * G.trace() / len(G)
        total = total + torch.trace(G @ change @ C @ change.T)
    return total


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("output_side", ["kfac", "mean"])
@pytest.mark.parametrize("how", KINDS)
def test_it_is_the_dense_formula_and_so_are_its_gradients(how, output_side, tiny_open_clip) -> None:
    """With PEFT's own treatment of DoRA's norm."""
    store, before = felt_store(tiny_open_clip), weights_of(tiny_open_clip)
    model = prepared(how, tiny_open_clip, store)
    anchor = anchor_penalty(model, store, output_side=output_side, energy=1.0)
    assert abs(anchor().item()) < 1e-9
    disturb(model)
    value = anchor()
    value.backward()
    found = gradients(model)
    with unpacked(model):
        expected = dense(model, before, store, how, output_side)
        expected.backward()
    true = gradients(model)
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    assert sum(anchor.report().values()) == pytest.approx(expected.item(), rel=1e-3)
    assert {n for n, g in true.items() if g.any()} <= found.keys()
    for name, gradient in found.items():
        assert (gradient - true[name]).norm() < 2e-3 * true[name].norm(), name
    assert anchor.backward(2.0).item() == pytest.approx(value.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, 2 * found[name], rtol=1e-4, atol=1e-9), name


# ------------------------------------------------------------------ what it foretells


class Line(nn.Module):
    """One linear layer, whose output is the embedding of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 8)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layer(pixel_values)


LINE = Family(
    "line",
    matches=lambda model: isinstance(model, Line),
    rules=(Rule("layer", "vision", "proj", "in"),),
    contrastive=Contrastive(
        encode_image=lambda model, batch: model(batch["pixel_values"]),
        encode_text=lambda model, batch: model(batch["input_ids"]),
        logit_scale=lambda model: torch.ones(()),
    ),
)


@pytest.mark.usefixtures("own_registrations")
@pytest.mark.parametrize("draws", [1, 4])
def test_it_foretells_the_change_of_the_embedding(draws) -> None:
    """Of one linear layer, whose inputs say nothing about its gradients, within a few percent."""
    register_family(LINE)
    generator = torch.Generator().manual_seed(1)
    model, x = Line(), torch.randn(20_000, 12, generator=generator)
    with torch.no_grad():  # a length of the embedding that depends little on the input
        model.layer.bias.normal_(generator=generator).mul_(4)
        model.layer.weight.mul_(0.5)
    store = collect_covariance(
        model, [{"pixel_values": x}], output_side=True, draws=draws, show_progress=False
    )
    before = F.normalize(model(x), dim=-1)
    anchor = anchor_penalty(model, store, output_side="kfac")
    with torch.no_grad():
        model.layer.weight.add_(0.02 * torch.randn(8, 12, generator=generator))
        after = F.normalize(model(x), dim=-1)
    change = (after - before).square().sum(1).mean().item()
    assert change > 1e-5
    assert anchor().item() == pytest.approx(change, rel=0.05)
    cosine = (after * before).sum(1).mean().item()
    assert anchor().item() == pytest.approx(2 * (1 - cosine), rel=0.05)


@pytest.mark.usefixtures("own_registrations")
def test_directions_that_the_output_does_not_feel_are_free() -> None:
    """A change that only stretches the embedding, which has unit length."""
    register_family(LINE)
    model, x = Line(), torch.randn(500, 12)
    with torch.no_grad():
        model.layer.weight[1:] = 0
        model.layer.bias.zero_()
        model.layer.bias[0] = 5.0
    store = collect_covariance(model, [{"pixel_values": x}], output_side=True, show_progress=False)
    anchors = {k: anchor_penalty(model, store, output_side=k) for k in ("none", "mean", "kfac")}
    with torch.no_grad():
        model.layer.weight[0] += 0.1
    assert anchors["none"]().item() > 1e-3
    assert anchors["mean"]().item() > 1e-3
    assert abs(anchors["kfac"]().item()) < 1e-9


# ------------------------------------------------------------------ other inputs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", KINDS)
def test_identity_is_the_relative_change_of_the_weights(how, tiny_open_clip) -> None:
    store, before = store_of(tiny_open_clip), weights_of(tiny_open_clip)
    model = prepared(how, tiny_open_clip, store)
    anchor = anchor_penalty(model, metric="identity")
    disturb(model)
    with unpacked(model):
        shares = {
            name: ((weight_now(model, name, how) - W).square().sum() / W.square().sum()).item()
            for name, W in before.items()
        }
    assert anchor().item() == pytest.approx(sum(shares.values()) / len(shares), rel=1e-3)
    assert anchor.report() == pytest.approx(shares, rel=2e-3)
    assert anchor.nbytes < 2 * sum(p.numel() * 4 for p in model.parameters())


def test_of_the_new_task_it_is_that_of_its_covariances(tiny_clip_hf) -> None:
    store, task = felt_store(tiny_clip_hf), felt_store(tiny_clip_hf, seed=6)
    model = prepared("lora", tiny_clip_hf, store)
    for output_side in ("none", "kfac"):
        options: dict[str, Any] = {"output_side": output_side}
        of_task = anchor_penalty(model, store, metric="task", task_store=task, **options)
        same, other = (anchor_penalty(model, one, **options) for one in (task, store))
        disturb(model)
        assert of_task().item() == same().item() != other().item()


def test_what_tells_anchors_apart(tiny_clip_hf) -> None:
    """The usual one as trainings noted it before there were others."""
    store = felt_store(tiny_clip_hf)
    model = prepared("lora", tiny_clip_hf, store)
    usual: Anchor = anchor_penalty(model, store)
    assert usual.identity.keys() == {"data", "energy", "sites"}
    felt = anchor_penalty(model, store, output_side="kfac")
    assert felt.identity == usual.identity | {"output_side": "kfac"}
    sizes = anchor_penalty(model, metric="identity").identity
    assert sizes == usual.identity | {"data": "", "metric": "identity"}
    assert len({tuple(anchor.sketch()) for anchor in (usual, felt)}) == 2


# ------------------------------------------------------------------ bad input


def test_what_is_missing_is_said(tiny_clip_hf) -> None:
    store = store_of(tiny_clip_hf)
    model = prepared("lora", tiny_clip_hf, store)
    with pytest.raises(CordaError, match=r"no output side.*calibrate --output-side"):
        anchor_penalty(model, store, output_side="kfac")
    with pytest.raises(CordaError, match=r"covariances of the new task, task_store="):
        anchor_penalty(model, store, metric="task")
    with pytest.raises(CordaError, match="covariances of what is to be kept"):
        anchor_penalty(model, output_side="mean")
    with pytest.raises(UnknownNameError, match="output_side 'kfca'"):
        anchor_penalty(model, store, output_side="kfca")
    with pytest.raises(CordaError, match="looks at weights alone"):
        anchor_penalty(model, store, metric="identity", output_side="kfac")
    with pytest.raises(CordaError, match="looks at weights alone"):
        AnchorOptions(anchor_metric="identity", anchor_output="mean")


def test_an_output_side_of_another_width(tiny_clip_hf) -> None:
    store = felt_store(tiny_clip_hf)
    model = prepared("lora", tiny_clip_hf, store)
    names = [site.name for site in find_sites(tiny_clip_hf)]
    entries: Any = store.need_output_side().entries
    entries[names[0]] = entries[next(n for n in names if n.endswith("fc1"))]
    with pytest.raises(ForeignFileError, match="64 wide, and the layer has 32 outputs"):
        anchor_penalty(model, store, output_side="kfac")
