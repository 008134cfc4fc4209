"""Every method on a convolutional tower: what it attaches starts as the model, and trains."""

from __future__ import annotations

import copy

import pytest
import torch

from corda_vlm.covariance import collect_covariance, collect_gradient
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.methods import METHODS, prepare_method
from tests.adapter.test_adapter import embed, relative
from tests.methods.test_gradient_starts import image_loss, make_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*have no full rank")
NOT_ON_CONVOLUTIONS = ("eva", "mica")  # PEFT has these starts for nn.Linear alone


def test_every_method_on_a_resnet(tiny_resnet):
    batch = make_batch()
    sites = {"towers": "vision"}
    store = collect_covariance(tiny_resnet, [batch], **sites, show_progress=False)
    task = collect_covariance(tiny_resnet, [make_batch(seed=2)], **sites, show_progress=False)
    gradient = collect_gradient(
        tiny_resnet, [make_batch(seed=2)], image_loss, **sites, show_progress=False
    )
    with unpacked(tiny_resnet):
        before = embed(tiny_resnet)
    for name, method in METHODS.items():
        if name in (*NOT_ON_CONVOLUTIONS, "linear-probe"):
            continue
        given = {
            "store": store
            if "knowledge" in method.covariances
            else (task if method.covariances else None),
            "task_store": task if "task" in method.covariances else None,
            "gradient": gradient if method.gradient else None,
        }
        options = (
            {"rank": 2, "a_norm": 5.0} if method.plan_method or name in ("lora", "dora") else {}
        )
        model = prepare_method(
            name, copy.deepcopy(tiny_resnet), show_progress=False, **sites, **options,
            **{k: v for k, v in given.items() if v is not None},
        )  # fmt: skip
        assert relative(embed(model), before) < 1e-4, name
        loss = image_loss(model, batch)
        loss.backward()
        trained = [p for n, p in model.named_parameters() if p.requires_grad and "layer" in n]
        assert trained, name
        assert any(p.grad is not None and bool(p.grad.any()) for p in trained), name


def test_ewc_weighs_the_change_of_a_kernel(tiny_resnet):
    from corda_vlm.train.terms.ewc import consolidation

    model = prepare_method("lora", tiny_resnet, rank=2, towers="vision", roles="conv")
    term = consolidation(model, [make_batch(6)])
    assert term().item() == 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    value = term()
    value.backward()
    assert float(value.detach()) > 0
