"""Covariances of real model classes against direct float64 sums, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from corda_vlm.covariance.checkpoint import Source
from corda_vlm.errors import (
    CalibrationError,
    CordaError,
    NoSitesError,
    UnknownNameError,
)
from corda_vlm.families.layers.attention import is_packed
from corda_vlm.sites import Site, find_sites
from tests.covariance.covariance_toy import (
    TOY_SITES,
    clip_batches,
    collect,
    direct,
    hook_count,
    joined,
    toy,
    toy_batches,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*have no full rank")


@pytest.mark.parametrize("which", ["tiny_clip_hf", "tiny_open_clip", "tiny_siglip"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_equals_direct_float64(which: str, precision: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    batches = clip_batches([3, 7, 1])
    store = collect(model, batches, precision=precision)
    assert list(store) == [site.name for site in find_sites(model)]
    rows = direct(model, batches, list(store))
    for site in find_sites(model):
        x, found = rows[site.name], store[site.name]
        assert found.count == len(x), site
        expected = x.T @ x / len(x)
        tolerance = 1e-5 if precision == "float32" else 1e-9
        assert (found.matrix - expected).norm() <= tolerance * expected.norm(), site
        assert found.matrix.dtype == torch.float64
    assert hook_count(model) == 0


def test_virtual_sites_of_packed_attention(tiny_open_clip: nn.Module) -> None:
    name = "visual.transformer.resblocks.0.attn.q_proj"
    store = collect(tiny_open_clip, clip_batches([4]))
    assert name in store
    assert store.stream_of(name) == store.stream_of(name.replace("q_proj", "v_proj"))
    packed = [m for m in tiny_open_clip.modules() if is_packed(m)]
    assert len(packed) == 4  # packed back


@pytest.mark.parametrize("which", ["tiny_clip_hf", "tiny_open_clip"])
def test_padding_never_counts(which: str, request: pytest.FixtureRequest) -> None:
    """Padded in one batch, or one by one without padding: the same covariance."""
    model = request.getfixturevalue(which)
    sites = find_sites(model, towers="text")
    (batch,) = clip_batches([8])
    alone = []
    for row in range(8):
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row : row + 1]
        if which == "tiny_clip_hf":
            alone.append({"input_ids": ids[:, :length]})
        else:  # open_clip takes the full context only
            mask = batch["attention_mask"][row : row + 1]
            alone.append({"input_ids": ids, "attention_mask": mask})
    padded, single = (collect(model, b, sites) for b in ([batch], alone))
    for site in sites:
        assert padded.counts(site.name) == single.counts(site.name)
        torch.testing.assert_close(
            padded[site.name].matrix, single[site.name].matrix, rtol=1e-4, atol=1e-5
        )
    total = int(batch["attention_mask"].sum())
    assert padded.counts(sites[0].name) == [total] != [8 * 12]


def test_batch_size_does_not_matter(tiny_clip_hf: nn.Module) -> None:
    samples = clip_batches([14])
    one, seven = (collect(tiny_clip_hf, joined(samples, size)) for size in (1, 7))
    for name in one:
        assert one.counts(name) == seven.counts(name)
        torch.testing.assert_close(one[name].matrix, seven[name].matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_half_precision_models(dtype: torch.dtype, precision: str) -> None:
    model = toy().to(dtype)
    batches = toy_batches(3, size=8)
    store = collect(model, batches, precision=precision)
    rows = direct(model, batches, list(store))
    for name, x in rows.items():
        expected = x.T @ x / len(x)
        error = (store[name].matrix - expected).norm() / expected.norm()
        assert error < (1e-5 if precision == "float32" else 5e-3), name


def test_bf16_products_are_close(tiny_clip_hf: nn.Module) -> None:
    batches = clip_batches([16])
    exact = collect(tiny_clip_hf, batches, precision="float64")
    fast = collect(tiny_clip_hf, batches, precision="bf16")
    assert fast.precision == "bf16"
    for name in exact:
        difference = (fast[name].matrix - exact[name].matrix).norm() / exact[name].matrix.norm()
        assert difference < 3e-3, name


# ------------------------------------------------------------------ bad input


def test_nan_names_site_batch_and_share() -> None:
    model, batches = toy(), toy_batches(4)

    def forward(model: Any, batch: dict) -> None:
        x = model.embed(batch["input_ids"])
        if batch is batches[2]:
            x = x.clone()
            x[0, 0, :3] = float("nan")
            x[1, 1, 0] = float("inf")
        model.a(x), model.b(x)

    with pytest.raises(
        CalibrationError,
        match=r"'a' and 'b' has NaN, Inf .* in batch 2 \(from 0\): 3.33% of the values, in 2 of 20 tokens",
    ):
        collect(model, batches, TOY_SITES[:2], forward=forward)
    assert hook_count(model) == 0

    def huge(model: Any, batch: dict) -> None:
        model.a(model.embed(batch["input_ids"]) * 1e25)

    with pytest.raises(CalibrationError, match="too large to square"):
        collect(model, batches, TOY_SITES[:1], forward=huge)
    collect(model, batches, TOY_SITES[:1], forward=huge, precision="float64")


def test_nan_in_padding_does_no_harm() -> None:
    model, (batch,) = toy(), toy_batches(1)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[:, 3:] = False

    def forward(model: Any, batch: dict) -> None:
        x = model.embed(batch["input_ids"])
        x[:, 3:] = float("nan")
        model.a(x)

    store = collect(model, [{**batch, "mask": mask}], TOY_SITES[:1], forward=forward)
    assert store["a"].count == 12
    assert store["a"].matrix.isfinite().all()


def test_unreached_sites_name_the_tower(tiny_clip_hf: nn.Module) -> None:
    images = [{"pixel_values": batch["pixel_values"]} for batch in clip_batches([4])]
    with pytest.raises(
        CalibrationError, match=r"no token reached 13 of 26 sites.*no inputs for the text tower"
    ):
        collect(tiny_clip_hf, images)
    assert len(collect(tiny_clip_hf, images, find_sites(tiny_clip_hf, towers="vision"))) == 13
    never = [*TOY_SITES, Site("head", "text", None, "proj", "head.in")]

    def headless(model: Any, batch: dict) -> None:
        x = model.embed(batch["input_ids"])
        model.c(model.a(x) + model.b(x))

    with pytest.raises(CalibrationError, match=r"reached 1 of 4 sites, 'head'; the model does not"):
        collect(toy(), toy_batches(1), never, forward=headless)
    padding = {**toy_batches(1)[0], "mask": torch.zeros(4, 5, dtype=torch.bool)}
    with pytest.raises(CalibrationError, match="no token reached"):
        collect(toy(), [padding])


@pytest.mark.parametrize("empty", [[], iter(()), (b for b in ())])
def test_empty_data(empty: object) -> None:
    with pytest.raises(CalibrationError, match="no calibration batches"):
        collect(toy(), empty)


def test_too_few_tokens_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"20 tokens|4 tokens for width 6. Take at least 6"):
        collect(toy(), toy_batches(1))


def test_wrong_arguments() -> None:
    model, batches = toy(), toy_batches(2)
    with pytest.raises(
        CalibrationError, match=r"batch 1 \(from 0\) is a list of 2 .*, not a mapping"
    ):
        collect(model, iter([batches[0], [1, 2]]))
    with pytest.raises(CalibrationError, match="give a list of it"):
        Source(batches[0])
    with pytest.raises(UnknownNameError, match="bf16, float32, float64"):
        collect(model, batches, precision="float16")
    with pytest.raises(CalibrationError, match="3 rounds need at least 3 batches, and there are 2"):
        collect(model, batches, rounds=3)
    with pytest.raises(CalibrationError, match="3 rounds need at least 3 batches, and there are 2"):
        collect(model, iter(batches), rounds=3)
    with pytest.raises(CordaError, match="rounds is 0"):
        collect(model, batches, rounds=0)
    with pytest.raises(CalibrationError, match="no sites"):
        collect(model, batches, [])
    with pytest.raises(CordaError, match="checkpoint_share"):
        collect(model, batches, checkpoint_share=0.0)
    with pytest.raises(NoSitesError, match="nowhere"):
        collect(model, batches, [Site("nowhere", "text", None, "q", "s")])
    with pytest.raises(CordaError, match="no family knows"):
        collect(nn.Linear(2, 2), batches)
    assert hook_count(model) == 0
