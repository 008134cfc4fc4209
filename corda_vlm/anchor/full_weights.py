"""Shares of matrices that are trained in full."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corda_vlm.anchor.metric import Metric, Metrics
from corda_vlm.anchor.output_side import Outputs
from corda_vlm.distributed.pieces import whole
from corda_vlm.errors import CordaError
from corda_vlm.families import any_family
from corda_vlm.families.layers.attention import is_packed, packed_weights
from corda_vlm.families.layers.experts import is_flipped, is_stack
from corda_vlm.families.layers.walk import inner_layer
from corda_vlm.precision import fast_dtype
from corda_vlm.sites import find_sites, get_layer

_BLOCK = 2**20
"""Entries at a time: what is written between the steps stays in a processor's cache."""


class _Energy(torch.autograd.Function):
    """`‖(W − W₀) C^½‖_F²`, or `tr(G (W − W₀) C (W − W₀)ᵀ)`: the product that its value needs is half its gradient."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, before: Tensor, metric: Metric, outputs: Metric | None
    ) -> Tensor:
        Y = torch.empty_like(before, dtype=torch.float32)  # (out, inp)
        energy = Y.new_zeros(())
        rows = max(1, _BLOCK // Y.shape[1])
        for now, then, y in zip(weight.split(rows), before.split(rows), Y.split(rows), strict=True):
            change = now.float() - then
            metric.times(change, out=y)
            if outputs is None:
                energy += torch.dot(change.flatten(), y.flatten())
        if outputs is not None:
            Y = outputs.times(Y.mT).mT.contiguous()  # G (W − W₀) C
            energy += torch.dot((weight.float() - before).flatten(), Y.flatten())
        ctx.dtype = weight.dtype
        ctx.save_for_backward(Y)
        return energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (Y,) = ctx.saved_tensors
        # in place, so that there is one such matrix: a second pass over one graph is an error of autograd's
        return Y.mul_(2 * grad).to(ctx.dtype), None, None, None


class FullWeights:
    """Weights trained in full, each beside what it was: a copy, or the original that PEFT keeps of `modules_to_save`.

    `copies` are those that another anchor has made.
    """

    def __init__(
        self,
        model: nn.Module,
        by_parent: dict[str, list[str]],
        metrics: Metrics,
        outputs: Outputs,
        copies: Mapping[str, Tensor],
    ) -> None:
        self.model, self.by_parent = model, by_parent
        self.names = tuple(name for names in by_parent.values() for name in names)
        self.before, self.metrics, self.outputs, self.weights = {}, {}, {}, {}
        self.copied: set[str] = set()
        self._sizes: dict[str, float] = {}
        for parent, names in by_parent.items():
            first = _weights_below(model, parent, names, as_trained=False)
            for name, weight in zip(names, first, strict=True):
                before = whole(weight.detach())
                if weight.requires_grad:  # one that is frozen has its trained copy beside it
                    before = copies[name] if name in copies else before.clone()
                    self.copied.add(name)
                size = float(metrics.row_energies(name, before).sum())
                self._sizes[name] = size
                self.weights[name] = outputs.weight(name, size, len(before))
                self.before[name] = before
                light = metrics.energy < 1
                dtype = fast_dtype(before.device) if light else torch.float32
                self.metrics[name] = metrics.of(name, before.shape[1], before.device, dtype)
                self.outputs[name] = outputs.metric(name, len(before), before.device, dtype)

    def sizes(self) -> dict[str, float]:
        return dict(self._sizes)

    def reweigh(self, factors: Mapping[str, float]) -> None:
        self.weights = {n: weight * factors.get(n, 1.0) for n, weight in self.weights.items()}

    def shares(self) -> Iterator[Float[Tensor, " n"]]:
        for parent, names in self.by_parent.items():
            weights, found = _weights_below(self.model, parent, names), []
            for name, weight in zip(names, map(whole, weights), strict=True):
                if self.before[name].device != weight.device:
                    self.before[name] = self.before[name].to(weight.device)
                with torch.autocast(weight.device.type, enabled=False):
                    energy = _Energy.apply(
                        weight, self.before[name], self.metrics[name], self.outputs[name]
                    )
                    found.append(energy * self.weights[name])
            yield torch.stack(found)

    def kept(self) -> list[Tensor]:
        found = [t for m in self._all_metrics() for t in (m.factor, m.rest)]
        return found + [self.before[name] for name in self.copied]

    def sketch(self) -> list[float]:
        return [*self.weights.values(), *(n for m in self._all_metrics() for n in m.sketch())]

    def _all_metrics(self) -> list[Metric]:
        outputs = [metric for metric in self.outputs.values() if metric is not None]
        return [*self.metrics.values(), *outputs]


def _weights_below(
    model: nn.Module, parent: str, names: Sequence[str], *, as_trained: bool = True
) -> list[Tensor]:
    """The weights of some layers of one module, packed or not, with their gradients."""
    # looked up at each call: attention may have been packed or unpacked meanwhile
    module = model
    for key in parent.split(".") if parent else ():
        if is_stack(module):  # split once too, and the rest of the path is a parameter's name
            return _experts_of(module, key, names)
        module = inner_layer(module._modules[key], as_trained=as_trained)
    if is_packed(module):  # split once, or each part's gradient would be as large as the whole
        parts = packed_weights(module)
        return [parts[name.rpartition(".")[2]] for name in names]
    return [get_layer(model, name, as_trained=as_trained).weight.flatten(1) for name in names]


def _experts_of(module: nn.Module, parameter: str, names: Sequence[str]) -> list[Tensor]:
    matrices = getattr(module, parameter).unbind()
    chosen = [matrices[int(name.rpartition(".")[2])] for name in names]
    return [matrix.mT for matrix in chosen] if is_flipped(module) else chosen


def trained_sites(bare: nn.Module, adapted: Collection[str]) -> list[str]:
    """Names of the sites without an adapter whose weight is trained."""
    by_parent: dict[str, list[str]] = {}
    sites = [site.name for site in find_sites(bare, any_family(bare))]
    for name in sites:
        by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    trained = {
        name
        for parent, names in by_parent.items()
        for name, weight in zip(names, _weights_below(bare, parent, names), strict=True)
        if weight.requires_grad
    }
    found = [name for name in sites if name in trained]
    for name in found:
        if name in adapted:
            raise CordaError(
                f"{name!r} has an adapter, and its base weight is trained as well; freeze one of the two"
            )
    return found
