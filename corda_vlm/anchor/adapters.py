"""Shares of layers with adapters: two small Gram matrices each, and what DoRA's rows add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraConv2dVariant, DoraLinearVariant, MiCALinearVariant
from torch import Tensor
from torch.autograd.function import once_differentiable

from corda_vlm.adapter.paired import PairedLayer, base_matrix, difference, trained
from corda_vlm.adapter.wrapped.carriers import Carrier
from corda_vlm.adapter.wrapped.parameters import parameter_matrix
from corda_vlm.anchor.metric import Metric, Metrics
from corda_vlm.anchor.output_side import Outputs
from corda_vlm.distributed.pieces import whole
from corda_vlm.errors import CordaError
from corda_vlm.families.layers.matrix import matrix_of

_DORA = (DoraLinearVariant, DoraConv2dVariant)


class _Projected(torch.autograd.Function):
    """`Q -> Q C Qᵀ` (n, k, k) and `Q C` (n, k, inp) for sites in a row; the first costs its gradient no product with C.

    With G for C and `Pᵀ` for Q as well.
    """

    @staticmethod
    def forward(ctx: Any, Q: Tensor, runs: Sequence[tuple[Metric, int]]) -> tuple[Tensor, Tensor]:
        Y = _times(Q, runs)
        ctx.runs = runs
        ctx.save_for_backward(Y)
        ctx.set_materialize_grads(False)
        return Y @ Q.mT, Y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dH: Tensor | None, dY: Tensor | None) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (Y,) = ctx.saved_tensors
        found = None if dH is None else (dH + dH.mT) @ Y
        if dY is not None:
            through = _times(dY, ctx.runs)
            found = through if found is None else found + through
        return found, None


def _times(Q: Float[Tensor, "n k inp"], runs: Sequence[tuple[Metric, int]]) -> Tensor:
    """`Q C`, the sites of one stream in one product."""
    found, at = [], 0
    for metric, count in runs:
        block = Q[at : at + count]
        found.append(metric.times(block.flatten(0, 1)).view_as(block))
        at += count
    return torch.cat(found)


@dataclass(frozen=True)
class Adapted:
    """One adapted layer, and what it was when the anchor was made.

    Attributes:
        adapters: those active then; their changes add up.
        start: `B₀` (scaled), `A₀` of PEFT's own adapters where their product is not zero; ours carry theirs.
        metric, stream: of its inputs.
        outputs: of its outputs; None where all count alike.
        weight: of its share in the anchor.
        size: `‖W C^½‖_F²` of the layer as it was.
        rows: DoRA: `v C vᵀ` (out,) and `v vᵀ` (out,) for the rows v of `V = W + B₀A₀`; where its outputs have a metric, in
            place of the first `G ∘ V C Vᵀ` (out, out).
        gain: DoRA: magnitude over norm of each row as they were (out,).
        expert: which of a layer's experts, whose factors are one tensor; None of a layer with one matrix.
    """

    name: str
    layer: LoraLayer
    adapters: tuple[str, ...]
    start: tuple[Tensor, Tensor] | None
    is_dora: bool
    stream: str = ""
    metric: Metric | None = None
    outputs: Metric | None = None
    weight: float = 0.0
    size: float = 0.0
    rows: tuple[Tensor, Tensor] | None = None
    gain: Tensor | None = None
    expert: int | None = None

    @property
    def is_ours(self) -> bool:
        return isinstance(self.layer, PairedLayer)

    @property
    def kind(self) -> tuple:
        """Sites of one kind are computed together."""
        B, A = self.pair()
        started = self.first() is not None
        # all experts of a layer are one tensor, which is taken as a whole
        own = None if self.expert is None else id(self.layer)
        shapes = B.device, B.shape[0], A.shape
        return *shapes, self.is_ours, self.is_dora, started, self.a_is_fixed, own

    @property
    def a_is_fixed(self) -> bool:
        layer = self.layer
        return isinstance(layer, PairedLayer) and all(map(layer.a_is_frozen, self.adapters))

    def pair(self) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"]]:
        return self._own(self.all_pairs())

    def first(self) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"]] | None:
        """The pair that counts as no change; None where `B₀A₀` is zero."""
        return self._own(self.all_firsts()) if self.is_ours else self.start

    def all_pairs(self) -> tuple[Float[Tensor, "*n out r"], Float[Tensor, "*n r inp"]]:
        """Those of all experts of the layer, or its own."""
        pairs = [trained(self.layer, name) for name in self.adapters]
        return _joined([(whole(B), whole(A)) for B, A in pairs])

    def all_firsts(self) -> tuple[Float[Tensor, "*n out r"], Float[Tensor, "*n r inp"]]:
        """The frozen pairs of one of ours, of all experts or its own."""
        assert isinstance(self.layer, PairedLayer)
        return _joined([self.layer.pair(name) for name in self.adapters])

    def _own(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        B, A = pair
        return (B, A) if self.expert is None else (B[self.expert], A[self.expert])

    def scales(self) -> list[float]:
        """Of each column of B, as they are now."""
        layer = self.layer
        return [layer.scaling[name] for name in self.adapters for _ in range(layer.r[name])]

    def reference(self) -> Float[Tensor, "out inp"]:
        """The weight before any change; for DoRA without the scale of its rows."""
        weight = self._base().float()
        if isinstance(self.layer, PairedLayer) and not self.layer.is_residual(self.adapters[0]):
            return weight
        if (first := self.first()) is None:
            return weight
        B, A = first
        return weight + B.float() @ A.float()

    def _base(self) -> Float[Tensor, "out inp"]:
        if not isinstance(self.layer, ParamWrapper):
            return base_matrix(self.layer).read()
        weight = parameter_matrix(self.layer)
        return weight if self.expert is None else weight[self.expert]

    def measured(self, metrics: Metrics, outputs: Outputs) -> Adapted:
        """Itself, with what of `W`, C and G is needed."""
        weight = self.reference()
        out, inp = weight.shape
        energies = metrics.row_energies(self.name, weight)
        site = replace(
            self,
            stream=metrics.stream_of(self.name, inp),
            metric=metrics.of(self.name, inp, weight.device),
            outputs=outputs.metric(self.name, out, weight.device),
            size=float(energies.sum()),
        )
        if self.is_dora:
            site = site._measured_rows(weight, energies)
        return replace(site, weight=outputs.weight(self.name, site.size, out))

    def _measured_rows(self, weight: Tensor, energies: Float[Tensor, " out"]) -> Adapted:
        norms = weight.square().sum(1)
        gain = self.magnitude().detach().float() / norms.sqrt()
        rows = energies.float()
        if self.outputs is not None and self.metric is not None:
            rows = self.outputs.rest * (self.metric.times(weight) @ weight.T)
        size = float((gain.double().square() * energies).sum())
        return replace(self, size=size, rows=(rows, norms), gain=gain)

    def magnitude(self) -> Float[Tensor, " out"]:
        magnitude: Any = self.layer.lora_magnitude_vector[self.adapters[0]].weight
        return whole(magnitude).flatten()  # of a convolution (1, out, 1, 1)


class Adapters:
    """Adapted layers of equal shape, stacked."""

    def __init__(self, sites: list[Adapted]) -> None:
        streams = list(dict.fromkeys(site.stream for site in sites))
        self.sites = sorted(sites, key=lambda site: streams.index(site.stream))
        self.names = tuple(site.name for site in self.sites)
        counts = [sum(site.stream == stream for site in sites) for stream in streams]
        metrics = {site.stream: site.metric for site in sites}
        self.runs = [
            (metric, count)
            for stream, count in zip(streams, counts, strict=True)
            if (metric := metrics[stream]) is not None
        ]
        # one of each layer's own, as each has its own outputs
        self.outputs = [(metric, 1) for site in self.sites if (metric := site.outputs) is not None]
        self.weights = torch.tensor([site.weight for site in self.sites])

    def factors(self) -> tuple[Float[Tensor, "n out k"], Float[Tensor, "n k inp"]]:
        """`P Q = ΔW` of every site, scaling included, in float32."""
        B, A = self._pairs()
        scales = [site.scales() for site in self.sites]
        scale = None
        if any(value != 1 for row in scales for value in row):
            scale = torch.tensor(scales, device=B.device)[:, None]  # (n, 1, r)
        like = self.sites[0]
        if not like.is_ours:
            # PEFT's scaling is of `B A` alone: the start stays what it was when someone turns it
            B, scale = (B if scale is None else B * scale), None
        if like.first() is None:
            P, Q = B, A
        else:
            B0, A0 = self._firsts()
            P, Q = (B - B0, A) if like.a_is_fixed else difference(B, A, B0, A0)
        if scale is not None:
            P = P * scale.repeat(1, 1, P.shape[2] // scale.shape[2])
        return P, Q

    def _pairs(self) -> tuple[Float[Tensor, "n out r"], Float[Tensor, "n r inp"]]:
        if self.sites[0].expert is None:
            return _stacked([site.pair() for site in self.sites])
        # by one index: the gradient of each expert's slice would be as large as all of them
        return self._of_experts(self.sites[0].all_pairs())

    def _firsts(self) -> tuple[Float[Tensor, "n out r"], Float[Tensor, "n r inp"]]:
        if self.sites[0].expert is None or not self.sites[0].is_ours:
            return _stacked([pair for site in self.sites if (pair := site.first())])
        return self._of_experts(self.sites[0].all_firsts())

    def _of_experts(self, pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        experts = [site.expert for site in self.sites]
        B, A = (factor.float() for factor in pairs)
        return (B, A) if experts == [*range(len(B))] else (B[experts], A[experts])

    def sizes(self) -> dict[str, float]:
        return {site.name: site.size for site in self.sites}

    def reweigh(self, factors: Mapping[str, float]) -> None:
        self.weights = self.weights * torch.tensor([factors.get(name, 1.0) for name in self.names])

    def shares(self) -> Iterator[Float[Tensor, " n"]]:
        with torch.autocast(self.sites[0].pair()[0].device.type, enabled=False):
            P, Q = self.factors()
            self.weights = self.weights.to(P.device)
            H, Y = _Projected.apply(Q, self.runs)  # (n, k, k), (n, k, inp)
            is_dora = self.sites[0].is_dora
            energies = self._dora(P, Q, H, Y) if is_dora else (self._gram(P)[0] * H).sum((1, 2))
        yield energies * self.weights

    def _gram(self, P: Float[Tensor, "n out k"]) -> tuple[Tensor, Float[Tensor, "n k out"]]:
        """`PᵀG P` (n, k, k) and `PᵀG`."""
        if self.outputs:
            return _Projected.apply(P.mT, self.outputs)
        return P.mT @ P, P.mT

    def _dora(self, P: Tensor, Q: Tensor, H: Tensor, Y: Tensor) -> Float[Tensor, " n"]:
        """`‖(s − s₀) V + s P Q‖²` in the metric of C, and of G, where s scales the rows and V is the weight at the start.

        `s` is the magnitude over the norm of the row of `V + P Q`, without a gradient through the norm, as PEFT's
        forward has it (DoRA, section 4.3).
        """
        V = [site.reference() for site in self.sites]
        rows, norms, before = (
            torch.stack([value.to(P.device) for value in values])
            for values in zip(
                *(
                    (*site.rows, site.gain)
                    for site in self.sites
                    if site.rows and site.gain is not None
                ),
                strict=True,
            )
        )  # (n, out) each; the first (n, out, out) where there is a G
        with torch.no_grad():
            VQ = torch.stack([v @ q.T for v, q in zip(V, Q, strict=True)])  # (n, out, k)
            norm = (norms + ((2 * VQ + P @ (Q @ Q.mT)) * P).sum(2)).clamp_min(0).sqrt()
        gain = torch.stack([site.magnitude() for site in self.sites]).float() / norm
        VY = torch.stack([v @ y.T for v, y in zip(V, Y, strict=True)])  # V C Qᵀ
        moved = gain - before
        gram, through = self._gram(gain[:, :, None] * P)
        still = ((rows @ moved[:, :, None])[:, :, 0] if self.outputs else rows * moved) * moved
        cross = (through.mT * VY).sum(2) * moved
        return (still + 2 * cross).sum(1) + (gram * H).sum((1, 2))

    def kept(self) -> list[Tensor]:
        metrics = [metric for metric, _ in (*self.runs, *self.outputs)]
        found: list[Tensor | None] = [t for m in metrics for t in (m.factor, m.rest)]
        found += [
            t for site in self.sites for t in (*(site.start or ()), *(site.rows or ()), site.gain)
        ]
        return [tensor for tensor in found if tensor is not None]

    def sketch(self) -> list[float]:
        metrics = [metric for metric, _ in (*self.runs, *self.outputs)]
        return [site.size for site in self.sites] + [n for m in metrics for n in m.sketch()]


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several adapters of one layer as one."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([B for B, _ in pairs], dim=-1), torch.cat([A for _, A in pairs], dim=-2)


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([B for B, _ in pairs]).float(), torch.stack([A for _, A in pairs]).float()


def as_adapted(carrier: Carrier) -> list[Adapted]:
    """What can be said about an adapted layer, or each expert of one, before its covariance is known."""
    layer, name = carrier.layer, carrier.sites[0]
    adapters = tuple(a for a in layer.active_adapters if a in layer.lora_A)
    variants = [layer.lora_variant.get(adapter) for adapter in adapters]
    if layer.merged:
        raise CordaError(
            f"the adapter of {name!r} is merged into the base, which the anchor needs apart; call "
            "`unmerge_adapter()` first"
        )
    is_dora = any(isinstance(variant, _DORA) for variant in variants)
    if is_dora and len(adapters) > 1:
        raise CordaError(
            f"{name!r} has several active adapters, of which one is DoRA: activate one"
        )
    known = (*_DORA, MiCALinearVariant)  # MiCA is LoRA with B frozen
    strange = [v for v in variants if v is not None and not isinstance(v, known)]
    if strange and not isinstance(layer, PairedLayer):
        raise CordaError(
            f"{name!r} carries a {type(strange[0]).__name__}, whose change the anchor cannot tell; it knows LoRA, "
            "rsLoRA, DoRA, MiCA, the adapters of corda_vlm, and full fine-tuning"
        )
    return [
        _started(
            Adapted(
                site, layer, adapters, None, is_dora, expert=number if carrier.stacked else None
            )
        )
        for number, site in enumerate(carrier.sites)
    ]


def _started(site: Adapted) -> Adapted:
    """Itself, with the pair that counts as no change, where that has a product."""
    layer = site.layer
    if isinstance(layer, PairedLayer):
        return site
    if not isinstance(layer, ParamWrapper) and matrix_of(layer.get_base_layer()) is None:
        return site  # a layer without a matrix has no covariance, which is said later
    B, A = (factor.detach() for factor in site.pair())
    if bool(B.any()) and bool(A.any()):
        return replace(site, start=(B * B.new_tensor(site.scales()), A.clone()))
    return site
