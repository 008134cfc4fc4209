"""What calibration and the task's gradient collect of convolutions: their patches are their tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from corda_vlm.covariance import collect_gradient
from corda_vlm.covariance.tokens import TokenSelector
from corda_vlm.errors import CalibrationError
from corda_vlm.families import Family, Rule, register_family
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.sites import get_layer
from tests.convolutions import ConvNet, conv_targets, make_images
from tests.covariance.covariance_toy import Named, clip_batches, collect, same

pytestmark = pytest.mark.filterwarnings("ignore:.*have no full rank")


def unfolded(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Rows (tokens, d) of what a layer reads, all patches at once."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(padded, layer.kernel_size, layer.dilation, stride=layer.stride)
    return columns.transpose(1, 2).flatten(0, 1)


def inputs_of(model: nn.Module, names: list[str], run: Any) -> dict[str, torch.Tensor]:
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    with unpacked(model), torch.no_grad():
        layers = {name: get_layer(model, name) for name in names}
        handles = [
            layer.register_forward_pre_hook(
                lambda _, args, name=name, layer=layer: seen[name].append(
                    unfolded(layer, args[0]).double()
                )
            )
            for name, layer in layers.items()
        ]
        run()
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def test_of_a_generic_model_it_is_that_of_all_patches():
    model, batches = ConvNet(), [make_images(seed=1), make_images(3, seed=2)]
    names = conv_targets(model)
    store = collect(model, batches, targets=names, precision="float64")
    rows = inputs_of(model, names, lambda: [model(batch) for batch in batches])
    assert list(store) == names
    for name in names:
        X = rows[name]
        assert store[name].count == len(X)
        torch.testing.assert_close(store[name].matrix, X.T @ X / len(X))


def test_of_a_resnet_with_its_pool_in_rounds(tiny_resnet):
    batches = [{"pixel_values": b["pixel_values"]} for b in clip_batches([3, 2, 4])]
    store = collect(tiny_resnet, batches, towers="vision", rounds=2, precision="float64")
    visual = tiny_resnet.visual
    for number, some in enumerate((batches[::2], batches[1::2])):
        run = lambda some=some: [visual(batch["pixel_values"]) for batch in some]  # noqa: E731
        rows = inputs_of(tiny_resnet, list(store), run)
        for name, X in rows.items():
            matrix = store.rounds(name)[number].matrix
            torch.testing.assert_close(matrix, X.T @ X / len(X), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_other_precisions_and_memory_formats(tiny_resnet, precision):
    batches = [{"pixel_values": b["pixel_values"]} for b in clip_batches([4, 4])]
    exact = collect(tiny_resnet, batches, towers="vision", precision="float64")
    found = collect(
        tiny_resnet.to(memory_format=torch.channels_last),
        batches,
        towers="vision",
        precision=precision,
    )
    within = 1e-5 if precision == "float32" else 2e-2
    for name in exact:
        difference = (found[name].matrix - exact[name].matrix).norm()
        assert difference < within * exact[name].matrix.norm(), name


def test_a_stop_and_going_on_give_the_same_to_the_bit(tiny_resnet, tmp_path):
    batches = clip_batches([3, 3, 3])

    class Stops(list):
        fingerprint = Named.fingerprint

        def __iter__(self):
            yield batches[0]
            yield {**batches[1], "pixel_values": torch.full((3, 3, 32, 32), float("nan"))}

    options: dict[str, Any] = {"checkpoint_share": 1.0, "rounds": 2}
    with pytest.raises(CalibrationError, match=r"layer1\.0\.conv1.*NaN, Inf"):
        collect(tiny_resnet, Stops(batches), path=tmp_path / "c.safetensors", **options)
    resumed = collect(tiny_resnet, Named(batches), path=tmp_path / "c.safetensors", **options)
    assert same(resumed, collect(tiny_resnet, Named(batches), **options))


def test_padding_in_a_tower_with_convolutions_is_refused_by_name():
    model = ConvNet()
    selector = TokenSelector()
    selector.begin({"vision": torch.tensor([[True, False], [True, True]])})
    with pytest.raises(
        CalibrationError, match=r"body\.same is a convolution, and the vision tower has a mask"
    ):
        list(
            selector.blocks(
                model.body["same"], make_images(), tower="vision", stream="s", site="body.same"
            )
        )


@pytest.mark.usefixtures("own_registrations")
def test_two_that_read_one_tensor_by_other_patches_are_no_stream():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 2, 3)

        def forward(self, pixel_values):
            return self.a(pixel_values), self.b(pixel_values)

    rules = (Rule("[ab]", "vision", "conv", "in", only="conv"),)
    register_family(Family("two", matches=lambda m: isinstance(m, Two), rules=rules))
    with pytest.raises(
        CalibrationError, match="'a' and 'b' are declared to read one input, but take other patches"
    ):
        collect(Two(), [{"pixel_values": make_images()}])


def test_the_task_s_gradient_is_that_of_the_weights_as_matrices():
    model, batches = (
        ConvNet().to(memory_format=torch.channels_last),
        [make_images(seed=3), make_images(seed=4)],
    )
    names = conv_targets(model)
    loss = lambda model, batch: model(batch["x"]).square().mean()  # noqa: E731
    gradient = collect_gradient(model, batches, loss, targets=names, show_progress=False)
    total: Any = sum(model(batch).square().mean() for batch in batches) / 2
    expected = torch.autograd.grad(total, [get_layer(model, n).weight for n in names])
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(gradient[name], value.contiguous().flatten(1))
