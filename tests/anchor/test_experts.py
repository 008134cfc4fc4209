"""The experts of a layer count as one in an anchor, each by its tokens."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from corda_vlm.adapter import attach_adapter
from corda_vlm.adapter.exchange.factors import changes
from corda_vlm.anchor import anchor_penalty
from corda_vlm.anchor.experts import shares_of_experts
from corda_vlm.covariance import collect_covariance
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import Site, site_weights
from tests.families.language_toy import text_batch
from tests.families.moe_toy import make


@pytest.mark.skipif(t.__version__.startswith("4."), reason="experts are stacks in transformers 5")
@pytest.mark.filterwarnings("ignore:.*fewer tokens than")
@pytest.mark.parametrize("base", ["untouched", "residual"])
def test_it_is_the_mean_over_layers(base):
    model = make("mixtral")
    store = collect_covariance(model, [text_batch(4)], show_progress=False)
    assert store.pooled
    before = {n: w.double().clone() for n, w in site_weights(model, list(store)).items()}
    attached = attach_adapter(
        model, plan_adapter(model, store, rank=2, show_progress=False), base=base
    )
    anchor = anchor_penalty(attached, store)
    assert anchor().item() == 0
    trainable = [p for p in attached.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trainable:
            parameter.add_(0.05 * torch.randn_like(parameter))
    anchor().backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable)
    layers: dict[object, list[float]] = {}
    report = anchor.report()
    for site in store.sites:
        B, A = changes(attached, "default")[site.name]
        covariance, change = store[site.name].matrix, (B @ A).double()
        moved = float(((change @ covariance) * change).sum())
        whole = float(((before[site.name] @ covariance) * before[site.name]).sum())
        assert report[site.name] == pytest.approx(moved / whole, rel=1e-3)
        tokens = 1 if site.pool is None else max(sum(store.counts(site.name)), 1)
        sums = layers.setdefault((site.pool, site.role) if site.pool else site.name, [0.0, 0.0])
        sums[0] += tokens * moved
        sums[1] += tokens * whole
    expected = sum(moved / whole for moved, whole in layers.values()) / len(layers)
    assert len(layers) == 2 * 6
    assert anchor().item() == pytest.approx(expected, rel=1e-3)


def test_shares_add_up_to_one_and_an_unseen_expert_has_one_too():
    sites = {
        name: Site(name, "language", 0, "down", name, pool)
        for name, pool in (("a", "p"), ("b", "p"), ("c", None))
    }
    shares = shares_of_experts(
        sites, sites, {"a": 2.0, "b": 4.0, "c": 1.0}.__getitem__, {"a": 6, "b": 0}.__getitem__
    )
    assert shares == {"a": 12 / 16, "b": 4 / 16}
    assert shares_of_experts(["a", "b"], sites, lambda name: 0.0, lambda name: 0) == {
        "a": 0.5,
        "b": 0.5,
    }
