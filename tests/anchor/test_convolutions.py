"""The anchor, EWC and every method on convolutions: the change of a weight is that of its matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from corda_vlm.adapter import attach_adapter
from corda_vlm.adapter.wrapped.targets import lora_targets
from corda_vlm.anchor import anchor_penalty
from corda_vlm.covariance import CovarianceStore, collect_covariance
from corda_vlm.plan import plan_adapter
from tests.convolutions import ConvNet, PlainConvNet, conv_targets, make_images

pytestmark = pytest.mark.filterwarnings("ignore:.*have no full rank")


def store_of(model: nn.Module) -> CovarianceStore:
    return collect_covariance(
        model, [make_images(40, seed=9)], targets=conv_targets(model), precision="float64", show_progress=False
    )  # fmt: skip


def adapted(kind: str, model: nn.Module, store: CovarianceStore) -> Any:
    names = conv_targets(model)
    if kind == "full":
        return model
    if kind in ("lora", "dora"):
        config = LoraConfig(**lora_targets(dict.fromkeys(names, 3)), use_dora=kind == "dora")
        return get_peft_model(model, config)
    plan = plan_adapter(model, store, rank=3, targets=names, show_progress=False)
    return attach_adapter(model, plan, base=kind)  # pyright: ignore[reportArgumentType]


def kernels(model: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """The weights that the layers compute with, read off their outputs."""
    found = {}
    bare: Any = model.base_model.model if hasattr(model, "peft_config") else model
    with torch.no_grad():
        for name in names:
            layer = bare.get_submodule(name)
            conv = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            basis = torch.eye(conv.weight[0].numel()).view(-1, *conv.weight.shape[1:])
            # one patch amid zeros wide enough for padding and dilation, where the sixth place of a row and column reads
            spread = basis.new_zeros(len(basis), conv.in_channels, 21, 21)
            (h, w), (dh, dw), (sh, sw) = conv.kernel_size, conv.dilation, conv.stride
            left, _, up, _ = conv._reversed_padding_repeated_twice
            top, start = 5 * sh - up, 5 * sw - left
            spread[:, :, top : top + h * dh : dh, start : start + w * dw : dw] = basis
            y = layer(spread) - layer(torch.zeros_like(spread))
            found[name] = y[:, :, 5, 5].T
    return found


@pytest.mark.parametrize("kind", ["untouched", "residual", "lora", "dora", "full"])
def test_it_is_the_relative_change_of_the_outputs_on_the_patches(kind):
    model = PlainConvNet() if kind in ("lora", "dora") else ConvNet()
    names = conv_targets(model)
    store = store_of(model)
    model = adapted(kind, model, store)
    before = kernels(model, names)
    anchor = anchor_penalty(model, store, sites=names, energy=1.0)
    assert anchor().item() == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (
                kind != "full" or name.removesuffix(".weight") in names
            ):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    after = kernels(model, names)
    expected = {}
    for name in names:
        C, change = store[name].matrix.float(), after[name] - before[name]
        expected[name] = float(
            ((change @ C) * change).sum() / ((before[name] @ C) * before[name]).sum()
        )
    assert anchor.report() == pytest.approx(expected, rel=2e-3)
    value = anchor()
    value.backward()
    assert float(value.detach()) == pytest.approx(sum(expected.values()) / len(expected), rel=2e-3)
    weights = [
        p
        for n, p in model.named_parameters()
        if p.requires_grad and "body" in n and "bias" not in n
    ]
    assert any(p.grad is not None and bool(p.grad.any()) for p in weights)


def test_with_the_output_side_too(tiny_resnet):
    from tests.covariance.covariance_toy import clip_batches

    batches = [{"pixel_values": b["pixel_values"]} for b in clip_batches([6, 6])]
    store = collect_covariance(
        tiny_resnet,
        batches,
        towers="vision",
        output_side=True,
        precision="float64",
        show_progress=False,
    )
    plan = plan_adapter(tiny_resnet, store, rank=2, towers="vision", show_progress=False)
    model: Any = attach_adapter(tiny_resnet, plan)
    anchor = anchor_penalty(model, store, output_side="kfac")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    assert anchor().item() > 0
    name = "visual.layer2.0.conv2"
    layer: Any = model.base_model.model.get_submodule(name)
    change = layer.get_delta_weight("default").flatten(1).double()
    G, C = store.output_side(name).matrix, store[name].matrix
    assert anchor.report()[name] == pytest.approx(float((G @ change @ C * change).sum()), rel=1e-3)
