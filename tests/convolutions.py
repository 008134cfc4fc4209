"""Convolutional models for tests: one with every geometry, and one that plain PEFT's LoRA can carry."""

from __future__ import annotations

import torch
from torch import nn

from corda_vlm.families.layers.conv2d import is_conv2d


class PlainConvNet(nn.Module):
    """Strides, padding, layers without a bias, a 1×1 and a grouped one; images of 3 channels to 5 numbers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.body = nn.ModuleDict({
                "strided": nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
                "same": nn.Conv2d(8, 8, 3, padding="same"),
                "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
                "pointwise": nn.Conv2d(8, 12, 1, bias=False),
                **self.further(),
            })  # fmt: skip
            self.head = nn.Linear(12, 5)
        self.eval()

    def further(self) -> dict[str, nn.Module]:
        return {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.body.values():
            x = torch.nn.functional.gelu(layer(x))
        return self.head(x.mean((2, 3)))


class ConvNet(PlainConvNet):
    """Beside them a dilated one, and one whose padding is no zeros."""

    def further(self) -> dict[str, nn.Module]:
        return {
            "dilated": nn.Conv2d(12, 10, 3, padding=2, dilation=2),
            "reflected": nn.Conv2d(10, 12, 3, padding=1, padding_mode="reflect", bias=False),
        }


def conv_targets(model: nn.Module) -> list[str]:
    """Its convolutions that can be adapted, but for the first."""
    return [name for name, m in model.named_modules() if is_conv2d(m) and name.startswith("body.")]


def make_images(count: int = 4, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 12, 11, generator=generator)
