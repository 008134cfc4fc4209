"""The anchor: how much a model has changed on the knowledge, while it is trained, and as a term of its loss.

Let C be the second moment of a layer's inputs on the knowledge. `‖ΔW C^½‖_F² / ‖W C^½‖_F²` is then the change of the
layer's outputs on that knowledge, relative to the outputs: weight decay in the metric of what is to be kept, towards
the weights the training began with. The anchor is its unweighted mean over the adapted layers.

    anchor = anchor_penalty(model, store)     # after the adapter is attached, before the first step
    loss = task_loss + 30.0 * anchor()

No square root of C is needed: `‖P Q C^½‖² = tr((PᵀP)(Q C Qᵀ))` takes an adapter one product of its `(2r, inp)` factor
with C. A matrix trained in full takes `⟨ΔW, ΔW C⟩`, whose gradient is twice the product that its value needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant, MiCALinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corda_vlm.adapter.paired import PairedConfig, PairedLinear, base_of, difference, trained
from corda_vlm.covariance import CovarianceStore
from corda_vlm.covariance.store import some
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.families import unwrap
from corda_vlm.families.attention import is_packed, packed_weights
from corda_vlm.sites import Site, find_sites, get_linear, model_fingerprint

FULL_ENERGY = 0.95
"""The share of C in its factor where whole matrices are trained. With the diagonal of the rest it gave emoji-clip's
anchor, trained in full on digits, 0.4 % too high, and 0.8 % in the worst layer; 0.9 gave 0.3 % and 3 %."""


def anchor_penalty(
    model: nn.Module,
    store: CovarianceStore,
    *,
    sites: Iterable[Site | str] | None = None,
    energy: float | None = None,
) -> Anchor:
    """The anchor of a model that is ready to train: what its weights are now counts as no change.

    Made for any adapter of this package (in both base modes, with A frozen too), for LoRA and DoRA of PEFT (rsLoRA
    and starts like PiSSA's included: the pair at this moment is the reference), and for weights trained in full (a
    copy of them is kept). Biases, norms and embeddings are not looked at. Build it *before* a checkpoint is loaded;
    only for adapters of this package, which carry their start with them, it does not matter.

    Args:
        model: as it is trained; its C go to the device of its weights at the first call.
        store: covariances of the knowledge to keep, collected from the model before it was adapted.
        sites: only these, of those that are adapted; None for all.
        energy: the share of each C's trace that its factor keeps; of the rest the diagonal is kept. 1 is exact.
            None: 1 for adapters, whose small directions a truncation would cover, and `FULL_ENERGY` for whole
            matrices.

    Memory: adapters keep one float32 `(inp, inp)` matrix for each input stream, shared by the layers that read it.
    Whole matrices keep a copy of the weights, and for each stream a factor `(inp, m)`, or C itself where
    `2 m > inp`: in bfloat16 where the device multiplies that faster; each step takes a float32 copy of the weights
    more, until its gradients are there.

    Raises:
        ForeignFileError: the covariances were collected from another model.
        CordaError: nothing is adapted, an adapted layer has no covariance in the store, a layer of `sites` is not
            adapted, an adapter is merged, or is of a kind whose change is not known here.
    """
    if energy is not None and not 0 < energy <= 1:
        raise CordaError(f"energy is a share of C, over 0 and at most 1; got {energy!r}")
    bare = unwrap(model)
    layers = {name: m for name, m in base_of(model).named_modules() if isinstance(m, LoraLayer)}
    starts = {name: _start(name, layer) for name, layer in layers.items() if layer.active_adapters}
    whole = _trained_weights(bare, layers)
    chosen = _chosen(store, [*starts, *whole], sites)
    _check_model(model, store, starts)
    exact, light = _Metrics(store, energy or 1.0), _Metrics(store, energy or FULL_ENERGY)
    groups: dict[tuple, list[_Adapted]] = defaultdict(list)
    parts: list[_Part] = []
    for name in chosen:
        if name in starts:
            site = starts[name].measured(store, exact)
            groups[site.kind].append(site)
    by_parent: dict[str, list[str]] = defaultdict(list)
    for name in chosen:
        if name in whole:
            by_parent[name.rpartition(".")[0]].append(name)
    parts += [_Adapters(group) for group in groups.values()]
    if by_parent:
        parts.append(_Whole(bare, by_parent, whole, store, light))
    return Anchor(bare, store, tuple(chosen), parts, energy)


class Anchor:
    """Made by `anchor_penalty`. Calling it gives the penalty: a float32 scalar, differentiable.

    Attributes:
        model: the bare model.
        sites: names of the anchored layers, in the model's order.
        data_fingerprint: of the data the covariances are of.
        energy: as it was given.
    """

    def __init__(
        self,
        model: nn.Module,
        store: CovarianceStore,
        sites: tuple[str, ...],
        parts: Sequence[_Part],
        energy: float | None,
    ) -> None:
        self.model, self.sites, self.energy = model, sites, energy
        self.data_fingerprint = store.data_fingerprint
        self._parts = parts

    def __call__(self) -> Float[Tensor, ""]:
        shares = [part.shares() for part in self._parts]
        return torch.cat([s.to(shares[0].device) for s in shares]).sum() / len(self.sites)

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Site -> relative change of its outputs on the knowledge, squared: 0.01 is a change by a tenth."""
        found = {
            name: share
            for part in self._parts
            for name, share in zip(part.names, part.shares().tolist(), strict=True)
        }
        return {name: found[name] for name in self.sites}

    @property
    def nbytes(self) -> int:
        """Memory that it keeps between two calls."""
        tensors = {id(t): t.nbytes for part in self._parts for t in part.kept()}
        return sum(tensors.values())

    def __repr__(self) -> str:
        return f"<Anchor: {len(self.sites)} sites, {self.nbytes / 1e6:.0f} MB>"


class _Part(Protocol):
    """Sites whose shares are computed together."""

    names: tuple[str, ...]

    def shares(self) -> Float[Tensor, " n"]: ...
    def kept(self) -> list[Tensor]: ...


# ------------------------------------------------------------------ C


@dataclass
class _Metric:
    """`X -> X C` for one stream, with `C = F Fᵀ + rest`; the rest is dense (inp, inp), or a diagonal (inp,)."""

    factor: Float[Tensor, "inp m"]
    rest: Float[Tensor, "*inp inp"]

    def times(self, x: Float[Tensor, "n inp"]) -> Float[Tensor, "n inp"]:
        if self.factor.device != x.device:
            self.factor, self.rest = self.factor.to(x.device), self.rest.to(x.device)
        light = x.to(self.factor.dtype)
        y = (light @ self.factor) @ self.factor.T
        if self.rest.ndim == 2:
            return torch.addmm(y, light, self.rest).float()
        return torch.addcmul(y.float(), x, self.rest)


class _Metrics:
    """The metric of each stream, made once."""

    def __init__(self, store: CovarianceStore, energy: float) -> None:
        self.store, self.energy = store, energy
        self._made: dict[tuple[str, torch.dtype], _Metric] = {}

    def of(self, site: str, device: torch.device, dtype: torch.dtype = torch.float32) -> _Metric:
        key = self.store.stream_of(site), dtype
        if key not in self._made:
            matrix = self.store[site].matrix.to(device)
            found = _truncated(matrix, self.energy, dtype) if self.energy < 1 else None
            self._made[key] = found or _dense(matrix, dtype)
        return self._made[key]


def _truncated(
    matrix: Float[Tensor, "inp inp"], energy: float, dtype: torch.dtype
) -> _Metric | None:
    """C's largest components up to `energy` of its trace, and the diagonal of what remains.

    None where that is no cheaper than C: the factor takes two products where C takes one.
    """
    values, vectors = torch.linalg.eigh(matrix.float())
    values, vectors = values.clamp_min(0).flip(0), vectors.flip(1)
    kept = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    if 2 * kept > len(matrix):
        return None
    factor = vectors[:, :kept] * values[:kept].sqrt()
    rest = (matrix.diagonal().float() - factor.square().sum(1)).clamp_min(0)
    return _Metric(factor.to(dtype), rest)


def _dense(matrix: Float[Tensor, "inp inp"], dtype: torch.dtype) -> _Metric:
    """All of C, its few largest components apart.

    One direction, the mean, often holds most of C. Apart from the others its rounding in float32 does not cover what
    an adapter does in directions that the knowledge hardly uses.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), min(_APART, len(matrix)), generator=generator)
    basis = start.to(matrix)
    for _ in range(8):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, turn = torch.linalg.eigh(basis.T @ matrix @ basis)
    factor = (basis @ turn * values.clamp_min(0).sqrt()).to(dtype)
    # what the rounded factor leaves, so that the sum is C whatever the iteration has found
    rest = matrix - factor.to(matrix) @ factor.to(matrix).T
    return _Metric(factor, rest.to(dtype))


_APART = 4


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where products in it are faster; never in place of an exact C."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
        fast = device.type == "cpu" and has_amx is not None and has_amx()
    return torch.bfloat16 if fast else torch.float32


# ------------------------------------------------------------------ adapters


class _Projected(torch.autograd.Function):
    """`Q -> Q C Qᵀ` (n, k, k) and `Q C` (n, k, inp) for sites in a row; the first costs its gradient no product with C."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, runs: Sequence[tuple[_Metric, int]]) -> tuple[Tensor, Tensor]:
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


def _times(Q: Float[Tensor, "n k inp"], runs: Sequence[tuple[_Metric, int]]) -> Tensor:
    """`Q C`, the sites of one stream in one product."""
    found, at = [], 0
    for metric, count in runs:
        block = Q[at : at + count]
        found.append(metric.times(block.flatten(0, 1)).view_as(block))
        at += count
    return torch.cat(found)


@dataclass(frozen=True)
class _Adapted:
    """One adapted layer, and what it was when the anchor was made.

    Attributes:
        adapters: those active then; their changes add up.
        start: `B₀` (scaled), `A₀` of PEFT's own adapters where their product is not zero; ours carry theirs.
        metric, stream: of its inputs.
        size: `‖W C^½‖_F²` of the layer as it was.
        rows: DoRA: `v C vᵀ` (out,) and `v vᵀ` (out,) for the rows v of `W + B₀A₀`.
        gain: DoRA: magnitude over norm of each row as they were (out,).
    """

    name: str
    layer: LoraLayer
    adapters: tuple[str, ...]
    start: tuple[Tensor, Tensor] | None
    is_dora: bool
    stream: str = ""
    metric: _Metric | None = None
    size: float = 0.0
    rows: tuple[Tensor, Tensor] | None = None
    gain: Tensor | None = None

    @property
    def is_ours(self) -> bool:
        return isinstance(self.layer, PairedLinear)

    @property
    def kind(self) -> tuple:
        """Sites of one kind are computed together."""
        B, A = self.pair()
        started = self.first() is not None
        return B.device, B.shape[0], A.shape, self.is_ours, self.is_dora, started, self.a_is_fixed

    @property
    def a_is_fixed(self) -> bool:
        layer = self.layer
        return isinstance(layer, PairedLinear) and all(map(layer.a_is_frozen, self.adapters))

    def pair(self) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"]]:
        return _joined([trained(self.layer, name) for name in self.adapters])

    def first(self) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"]] | None:
        """The pair that counts as no change; None where `B₀A₀` is zero."""
        if isinstance(self.layer, PairedLinear):
            return _joined([self.layer.pair(name) for name in self.adapters])
        return self.start

    def scales(self) -> list[float]:
        """Of each column of B, as they are now."""
        layer = self.layer
        return [layer.scaling[name] for name in self.adapters for _ in range(layer.r[name])]

    def reference(self) -> Float[Tensor, "out inp"]:
        """The weight before any change; for DoRA without the scale of its rows."""
        weight = dequantize_module_weight(self.layer.get_base_layer()).detach().float()
        if isinstance(self.layer, PairedLinear) and not self.layer.is_residual(self.adapters[0]):
            return weight
        if (first := self.first()) is None:
            return weight
        B, A = first
        return weight + B.float() @ A.float()

    def measured(self, store: CovarianceStore, metrics: _Metrics) -> _Adapted:
        """Itself, with what of `W` and C is needed."""
        weight = self.reference()
        _check_width(store, self.name, weight)
        C = store[self.name].matrix.to(weight)
        energies = ((weight @ C) * weight).sum(1, dtype=torch.float64)
        stream, metric = store.stream_of(self.name), metrics.of(self.name, weight.device)
        if not self.is_dora:
            size = float(energies.sum())
            return replace(self, stream=stream, metric=metric, size=size)
        norms = weight.square().sum(1)
        gain = self.magnitude().detach().float() / norms.sqrt()
        size = float((gain.double().square() * energies).sum())
        rows = energies.float(), norms
        return replace(self, stream=stream, metric=metric, size=size, rows=rows, gain=gain)

    def magnitude(self) -> Float[Tensor, " out"]:
        return self.layer.lora_magnitude_vector[self.adapters[0]].weight  # pyright: ignore[reportReturnType]


class _Adapters:
    """Adapted layers of equal shape, stacked."""

    def __init__(self, sites: list[_Adapted]) -> None:
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
        self.weights = torch.tensor(
            [1 / site.size if site.size > 0 else 0.0 for site in self.sites]
        )

    def factors(self) -> tuple[Float[Tensor, "n out k"], Float[Tensor, "n k inp"]]:
        """`P Q = ΔW` of every site, scaling included, in float32."""
        B, A = _stacked([site.pair() for site in self.sites])
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
            B0, A0 = _stacked([pair for site in self.sites if (pair := site.first())])
            P, Q = (B - B0, A) if like.a_is_fixed else difference(B, A, B0, A0)
        if scale is not None:
            P = P * scale.repeat(1, 1, P.shape[2] // scale.shape[2])
        return P, Q

    def shares(self) -> Float[Tensor, " n"]:
        with torch.autocast(self.sites[0].pair()[0].device.type, enabled=False):
            P, Q = self.factors()
            self.weights = self.weights.to(P.device)
            H, Y = _Projected.apply(Q, self.runs)  # (n, k, k), (n, k, inp)
            if self.sites[0].is_dora:
                return self._dora(P, Q, H, Y) * self.weights
            return ((P.mT @ P) * H).sum((1, 2)) * self.weights

    def _dora(self, P: Tensor, Q: Tensor, H: Tensor, Y: Tensor) -> Float[Tensor, " n"]:
        """`‖(s − s₀) V + s P Q‖²` in the metric of C, where s scales the rows and V is the weight at the start.

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
        )  # (n, out) each
        with torch.no_grad():
            VQ = torch.stack([v @ q.T for v, q in zip(V, Q, strict=True)])  # (n, out, k)
            norm = (norms + ((2 * VQ + P @ (Q @ Q.mT)) * P).sum(2)).clamp_min(0).sqrt()
        gain = torch.stack([site.magnitude() for site in self.sites]).float() / norm
        VY = torch.stack([v @ y.T for v, y in zip(V, Y, strict=True)])  # V C Qᵀ
        cross, own = (P * VY).sum(2), ((P @ H) * P).sum(2)
        moved = gain - before
        return (moved.square() * rows + 2 * moved * gain * cross + gain.square() * own).sum(1)

    def kept(self) -> list[Tensor]:
        found: list[Tensor | None] = [t for m, _ in self.runs for t in (m.factor, m.rest)]
        found += [
            t for site in self.sites for t in (*(site.start or ()), *(site.rows or ()), site.gain)
        ]
        return [tensor for tensor in found if tensor is not None]


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several adapters of one layer as one."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([B for B, _ in pairs], dim=1), torch.cat([A for _, A in pairs], dim=0)


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([B for B, _ in pairs]).float(), torch.stack([A for _, A in pairs]).float()


def _start(name: str, layer: LoraLayer) -> _Adapted:
    """What can be said about an adapted layer before its covariance is known."""
    adapters = tuple(a for a in layer.active_adapters if a in layer.lora_A)
    variants = [layer.lora_variant.get(adapter) for adapter in adapters]
    if layer.merged:
        raise CordaError(
            f"the adapter of {name!r} is merged into the base, which the anchor needs apart; call "
            "`unmerge_adapter()` first"
        )
    is_dora = any(isinstance(variant, DoraLinearVariant) for variant in variants)
    if is_dora and len(adapters) > 1:
        raise CordaError(
            f"{name!r} has several active adapters, of which one is DoRA: activate one"
        )
    known = (DoraLinearVariant, MiCALinearVariant)  # MiCA is LoRA with B frozen
    strange = [v for v in variants if v is not None and not isinstance(v, known)]
    if strange and not isinstance(layer, PairedLinear):
        raise CordaError(
            f"{name!r} carries a {type(strange[0]).__name__}, whose change the anchor cannot tell; it knows LoRA, "
            "rsLoRA, DoRA, the adapters of corda_vlm, and full fine-tuning"
        )
    site = _Adapted(name, layer, adapters, None, is_dora)
    if isinstance(layer, PairedLinear) or not isinstance(layer.get_base_layer(), nn.Linear):
        return site  # a layer that is no nn.Linear has no covariance, which is said later
    B, A = (factor.detach() for factor in site.pair())
    if bool(B.any()) and bool(A.any()):
        site = replace(site, start=(B * B.new_tensor(site.scales()), A.clone()))
    return site


# ------------------------------------------------------------------ whole matrices


class _Energy(torch.autograd.Function):
    """`‖(W − W₀) C^½‖_F²`: the product that its value needs is half its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, before: Tensor, metric: _Metric) -> Tensor:
        change = weight.float() - before
        Y = metric.times(change)
        ctx.dtype = weight.dtype
        ctx.save_for_backward(Y)
        return torch.dot(change.flatten(), Y.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (Y,) = ctx.saved_tensors
        return (Y * (2 * grad)).to(ctx.dtype), None, None


class _Whole:
    """Weights trained in full, each beside a copy of what it was."""

    def __init__(
        self,
        model: nn.Module,
        by_parent: dict[str, list[str]],
        weights: dict[str, Tensor],
        store: CovarianceStore,
        metrics: _Metrics,
    ) -> None:
        self.model, self.by_parent = model, by_parent
        self.names = tuple(name for names in by_parent.values() for name in names)
        self.before, self.metrics, sizes = {}, {}, []
        for name in self.names:
            weight = weights[name].detach()
            _check_width(store, name, weight)
            C = store[name].matrix.to(weight.device, torch.float32)
            size = float(((weight.float() @ C) * weight).sum(dtype=torch.float64))
            sizes.append(1 / size if size > 0 else 0.0)
            self.before[name] = weight.clone()
            light = metrics.energy < 1
            dtype = _fast_dtype(weight.device) if light else torch.float32
            self.metrics[name] = metrics.of(name, weight.device, dtype)
        self.weights = torch.tensor(sizes)

    def shares(self) -> Float[Tensor, " n"]:
        found = []
        for parent, names in self.by_parent.items():
            weights = _weights_below(self.model, parent, names)
            for name, weight in zip(names, weights, strict=True):
                if self.before[name].device != weight.device:
                    self.before[name] = self.before[name].to(weight.device)
                with torch.autocast(weight.device.type, enabled=False):
                    found.append(_Energy.apply(weight, self.before[name], self.metrics[name]))
        self.weights = self.weights.to(found[0].device)
        return torch.stack([value.to(found[0].device) for value in found]) * self.weights

    def kept(self) -> list[Tensor]:
        found = [t for m in self.metrics.values() for t in (m.factor, m.rest)]
        return found + list(self.before.values())


def _weights_below(model: nn.Module, parent: str, names: Sequence[str]) -> list[Tensor]:
    """The weights of some layers of one module, packed or not, with their gradients."""
    # looked up at each call: attention may have been packed or unpacked meanwhile
    module = model.get_submodule(parent)
    if is_packed(module):  # split once, or each part's gradient would be as large as the whole
        parts = packed_weights(module)
        return [parts[name.rpartition(".")[2]] for name in names]
    return [get_linear(model, name).weight for name in names]


def _trained_weights(bare: nn.Module, layers: dict[str, LoraLayer]) -> dict[str, Tensor]:
    """Site name -> weight, for sites without an adapter whose weight is trained."""
    found = {}
    for site in find_sites(bare):
        (weight,) = _weights_below(bare, site.name.rpartition(".")[0], [site.name])
        if not weight.requires_grad:
            continue
        if site.name in layers:
            raise CordaError(
                f"{site.name!r} has an adapter, and its base weight is trained as well; freeze one of the two"
            )
        found[site.name] = weight
    return found


# ------------------------------------------------------------------ what is refused


def _chosen(
    store: CovarianceStore, adapted: Sequence[str], sites: Iterable[Site | str] | None
) -> list[str]:
    """Names to anchor, in the store's order."""
    if not adapted:
        raise CordaError(
            "no layer of this model is adapted or trained, so there is nothing to anchor: attach the adapter (or set "
            "requires_grad, for full fine-tuning) before anchor_penalty"
        )
    if sites is None:
        missing = [name for name in adapted if name not in store]
        if len(missing) == len(adapted):
            raise CordaError(
                f"the store has the covariances of {some(list(store))}, and none of the adapted layers, "
                f"{some(missing)}: collect them for these"
            )
        if missing:
            raise CordaError(
                f"the store has no covariance of the adapted layers {some(missing)}: collect them too, or anchor only "
                "some layers, with sites="
            )
        return [name for name in store if name in set(adapted)]
    wanted = {site.name if isinstance(site, Site) else site for site in sites}
    if not wanted:
        raise CordaError("sites is empty: name at least one adapted layer, or leave it out for all")
    for problem, names in (
        ("not adapted, so they cannot change", wanted - set(adapted)),
        ("not in the covariance store", wanted - set(store)),
    ):
        if names:
            raise CordaError(f"layers of sites= that are {problem}: {some(sorted(names))}")
    return [name for name in store if name in wanted]


def _check_model(model: nn.Module, store: CovarianceStore, starts: dict[str, _Adapted]) -> None:
    """Raise `ForeignFileError` unless the store was collected from what the model was before its adapter."""
    configs = getattr(model, "peft_config", {})
    origins = [
        config.origin["model_fingerprint"]
        for config in configs.values()
        if isinstance(config, PairedConfig)
        and config.base == "residual"  # its base has another fingerprint
        and "model_fingerprint" in config.origin
    ]
    found = origins[0] if origins else model_fingerprint(model)
    # PEFT's PiSSA, OLoRA and CorDA rewrite the base and keep no record of what it was
    if found == store.model_fingerprint or any(site.start for site in starts.values()):
        return
    raise ForeignFileError(
        f"the covariances were collected from the model {store.model_fingerprint}, and this one is {found}: other "
        "layers or other weights. Collect them from this model before it is trained, or build the anchor before a "
        "checkpoint is loaded"
    )


def _check_width(store: CovarianceStore, name: str, weight: Tensor) -> None:
    if (width := store.entries(store.stream_of(name))[0].size) != weight.shape[1]:
        raise ForeignFileError(
            f"the covariance of {name!r} is {width} wide, and the layer has {weight.shape[1]} inputs: the store is of "
            "another model"
        )
