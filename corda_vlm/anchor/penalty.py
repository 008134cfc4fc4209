"""The anchor of a model: which layers, in which metric, and their mean or sum."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from corda_vlm.adapter.paired import PairedConfig, base_of
from corda_vlm.adapter.wrapped.carriers import carriers
from corda_vlm.anchor.adapters import Adapted, Adapters, as_adapted
from corda_vlm.anchor.experts import shares_of_experts
from corda_vlm.anchor.full_weights import FullWeights, trained_sites
from corda_vlm.anchor.metric import IdentityMetrics, Metrics
from corda_vlm.anchor.options import AnchorMetric, OutputSide, check_anchor_metric
from corda_vlm.anchor.output_side import Outputs
from corda_vlm.covariance import CovarianceStore
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.families import unwrap
from corda_vlm.names import quoted
from corda_vlm.options import fitted
from corda_vlm.same_model import is_made_from
from corda_vlm.sites import Site, every_site, lies_in, model_fingerprint

logger = logging.getLogger(__name__)

FULL_ENERGY = 0.95
"""The share of C in its factor where whole matrices are trained. With the diagonal of the rest it gave emoji-clip's
anchor, trained in full on digits, 0.4 % too high, and 0.8 % in the worst layer; 0.9 gave 0.3 % and 3 %."""


def anchor_penalty(
    model: nn.Module,
    store: CovarianceStore | None = None,
    *,
    metric: AnchorMetric = "knowledge",
    output_side: OutputSide = "none",
    task_store: CovarianceStore | None = None,
    sites: Iterable[Site | str] | None = None,
    energy: float | None = None,
    beside: Anchor | None = None,
) -> Anchor:
    """The anchor of a model that is ready to train: what its weights are now counts as no change.

    It is `mean over layers of ‖ΔW C^½‖² / ‖W C^½‖²`, the relative change of the layers' outputs on the knowledge; the experts of
    one matrix are one layer there, each counting by its tokens (see `shares_of_experts`). With
    `output_side="kfac"` it is `Σ over layers of tr(G ΔW C ΔWᵀ)`, with `G = E[Σ_t g_t g_tᵀ]` and `g_t = ∂⟨v, f⟩/∂y_t`: the
    squared change `E‖Δf‖²` of what the model gives out, to second order, each layer and each token for itself (K-FAC).
    For CLIP f is the unit embedding, so that the penalty is twice `1 − cos` between the embeddings before and after, and
    those of several towers add up; for a language model it is twice the KL divergence of a next token from what it
    was, in nats. Of a training, whose changes in several layers add up, it tells less than the truth: on emoji-clip a third
    for plain LoRA, a tenth and less for trainings against it.

    Made for any adapter of this package (in both base modes, with A frozen too), for LoRA and DoRA of PEFT (rsLoRA
    and starts like PiSSA's included: the pair at this moment is the reference), and for weights trained in full (a
    copy of them is kept), and for layers that `modules_to_save` trains whole beside an adapter, such as LLaVA's
    projector, where the store has their covariance (the originals count as no change). Biases, norms, embeddings and
    output layers are not looked at. Build it *before* a checkpoint is loaded; only for adapters of this package, which
    carry their start with them, it does not matter.

    Args:
        model: as it is trained; its C go to the device of its weights at the first call.
        store: covariances of the knowledge to keep, collected from the model before it was adapted; the metric "identity"
            needs none.
        metric: "knowledge", C of `store`; "task", C of `task_store`; "identity", the identity for C: L2 on the relative
            change of the weights, `‖ΔW‖² / ‖W‖²`.
        output_side: "none"; "kfac", with the G of `collect_covariance(output_side=True)`; "mean", one number a layer,
            `tr(G) / out`, in place of its G.
        task_store: covariances of the new task.
        sites: only these, of those that are adapted; None for all.
        energy: the share of each C's trace that its factor keeps; of the rest the diagonal is kept. 1 is exact.
            None: 1 for adapters, whose small directions a truncation would cover, and `FULL_ENERGY` for whole
            matrices.
        beside: another anchor of this model, made at this moment too: what both need, copies of weights and matrices of
            the same covariances, is kept once.

    Memory: adapters keep one float32 `(inp, inp)` matrix for each input stream, shared by the layers that read it.
    Whole matrices keep a copy of the weights, and for each stream a factor `(inp, m)`, or C itself where
    `2 m > inp`: in bfloat16 where the device multiplies that faster. In a step `Anchor.backward` takes a float32 copy
    of a few weight matrices more, `anchor().backward()` one of them all. For a CLIP of ViT-B/32's size and both towers
    that is 782 MB for adapters and 652 MB in full, and 2 to 3 % of a step's time and 8 % (eval/benchmarks/anchor_step.py).

    Raises:
        ForeignFileError: the covariances were collected from another model.
        CordaError: no store for the metric, a store without the output side, nothing is adapted, an adapted layer has no covariance in the store, a layer of `sites` is not
            adapted, an adapter is merged, or is of a kind whose change is not known here.
    """
    if energy is not None and not 0 < energy <= 1:
        raise CordaError(f"energy is a share of C, over 0 and at most 1; got {energy!r}")
    source = _source(store, task_store, metric, output_side)
    bare = unwrap(model)
    wrapped = list(carriers(model))
    starts = {
        site.name: site
        for carrier in wrapped
        if any(adapter in carrier.layer.lora_A for adapter in carrier.layer.active_adapters)
        for site in as_adapted(carrier)
    }
    whole = trained_sites(bare, [name for carrier in wrapped for name in carrier.sites])
    if source is None:
        known = [site.name for site in every_site(bare)]
        exact = light = IdentityMetrics()
    else:
        known = list(source)
        unseen = _unseen(model, source, whole)
        whole = [name for name in whole if name not in unseen]
        exact, light = (
            _metrics_of(source, share, beside) for share in (energy or 1.0, energy or FULL_ENERGY)
        )
    of = "these are no sites of the model, which the metric identity knows alone"
    if source is not None:
        of = "the store has no covariance of them, collect it too"
    chosen = _chosen(known, [*starts, *whole], sites, of)
    if source is not None:
        _check_model(model, source, starts)
    outputs = Outputs(output_side, source)
    groups: dict[tuple, list[Adapted]] = defaultdict(list)
    parts: list[_Part] = []
    for name in chosen:
        if name in starts:
            site = starts[name].measured(exact, outputs)
            groups[site.kind].append(site)
    by_parent: dict[str, list[str]] = defaultdict(list)
    for name in chosen:
        if name in whole:
            by_parent[name.rpartition(".")[0]].append(name)
    parts += [Adapters(group) for group in groups.values()]
    if by_parent:
        former = {} if beside is None else beside.copies()
        parts.append(FullWeights(bare, by_parent, light, outputs, former))
    anchor = Anchor(bare, source, tuple(chosen), parts, energy, metric, output_side)
    anchor.metrics = (exact, light)
    if not outputs.is_sum:
        sizes = {name: size for part in parts for name, size in part.sizes().items()}
        described = {
            site.name: site for site in (every_site(bare) if source is None else source.sites)
        }
        counts = (lambda name: 1) if source is None else (lambda name: sum(source.counts(name)))
        anchor.weigh_experts(shares_of_experts(chosen, described, sizes.__getitem__, counts))
    return anchor


def _metrics_of(store: CovarianceStore, energy: float, beside: Anchor | None) -> Metrics:
    """Those of a store, shared with another anchor that has them."""
    for metrics in () if beside is None else beside.metrics:
        if metrics.energy == energy and getattr(metrics, "store", None) is store:
            return metrics
    return Metrics(store, energy)


class Anchor:
    """Made by `anchor_penalty`. Calling it gives the penalty: a float32 scalar, differentiable.

    Attributes:
        model: the bare model.
        sites: names of the anchored layers, in the model's order.
        data_fingerprint: of the data the covariances are of; empty with the metric "identity".
        energy, metric, output_side: as they were given.
        metrics: what its matrices were made by, of adapters and of whole weights.
    """

    def __init__(
        self,
        model: nn.Module,
        store: CovarianceStore | None,
        sites: tuple[str, ...],
        parts: Sequence[_Part],
        energy: float | None,
        metric: AnchorMetric = "knowledge",
        output_side: OutputSide = "none",
    ) -> None:
        self.model, self.sites, self.energy = model, sites, energy
        self.metric, self.output_side = metric, output_side
        self.data_fingerprint = "" if store is None else store.data_fingerprint
        self._parts = parts
        self.metrics: tuple[Metrics, ...] = ()
        self._over: float = len(sites) if output_side == "none" else 1
        self._experts: dict[str, float] = {}

    def weigh_experts(self, shares: Mapping[str, float]) -> None:
        """Count the experts of a layer as one, see `shares_of_experts`."""
        for part in self._parts:
            part.reweigh(shares)
        self._experts = dict(shares)
        self._over = len(self.sites) - len(shares) + sum(shares.values())

    @property
    def name(self) -> str:
        """As a term of the loss: that of another metric has another name."""
        return anchor_name(self.metric, self.output_side)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from other anchors, as JSON; the usual one as trainings noted it before there were others."""
        known = {"data": self.data_fingerprint, "energy": self.energy, "sites": len(self.sites)}
        return known | self._unusual()

    def _unusual(self) -> dict[str, str]:
        return _unusual(self.metric, self.output_side)

    def __call__(self) -> Float[Tensor, ""]:
        values = [shares.sum() for part in self._parts for shares in part.shares()]
        return torch.stack([v.to(values[0].device) for v in values]).sum() / self._over

    def backward(
        self, weight: float = 1.0, through: Callable[[Tensor], Any] = Tensor.backward
    ) -> Float[Tensor, ""]:
        """As `(weight * anchor()).backward()`, a few layers at a time: with whole matrices that takes less memory and time.

        Args:
            through: runs one backward pass; those of mixed precision scale the gradients.

        Returns:
            The value, without weight and gradient.
        """
        found = []
        for part in self._parts:
            for shares in part.shares():
                value = shares.sum() / self._over
                through(weight * value)
                found.append(value.detach())
        return torch.stack([value.to(found[0].device) for value in found]).sum()

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Site -> relative change of its outputs on the knowledge, squared: 0.01 is a change by a tenth.

        With an output side the site's part of the squared change of the model's output.
        """
        found = {
            name: share
            for part in self._parts
            for name, share in zip(
                part.names, [s for shares in part.shares() for s in shares.tolist()], strict=True
            )
        }
        return {name: found[name] / (self._experts.get(name) or 1) for name in self.sites}

    def copies(self) -> dict[str, Tensor]:
        """Layers that are trained in full, as they were, where that takes a copy."""
        full = [part for part in self._parts if isinstance(part, FullWeights)]
        return {name: part.before[name] for part in full for name in part.copied}

    def sketch(self) -> list[float]:
        """A few numbers of each matrix and layer: anchors that differ in the knowledge, the layers or what counts as no
        change differ in one of them by more than rounding."""
        named = repr((self.sites, self.energy, self.metric, self.output_side))
        names = hashlib.blake2b(named.encode(), digest_size=6)
        numbers = [number for part in self._parts for number in part.sketch()]
        return [float(int(names.hexdigest(), 16)), *numbers]

    @property
    def nbytes(self) -> int:
        """Memory that it keeps between two calls."""
        tensors = {id(t): t.nbytes for part in self._parts for t in part.kept()}
        return sum(tensors.values())

    def __repr__(self) -> str:
        return f"<Anchor: {len(self.sites)} sites, {self.nbytes / 1e6:.0f} MB>"


def anchor_name(metric: str, output_side: str) -> str:
    """What an anchor is called as a term of the loss: one of another metric has another name."""
    return "_".join(["anchor", *_unusual(metric, output_side).values()])


def _unusual(metric: str, output_side: str) -> dict[str, str]:
    chosen = {"metric": metric, "output_side": output_side}
    usual = {"metric": "knowledge", "output_side": "none"}
    return {name: value for name, value in chosen.items() if value != usual[name]}


@runtime_checkable
class _Part(Protocol):
    """Sites whose shares are computed together."""

    names: tuple[str, ...]

    def sizes(self) -> dict[str, float]:
        """Name -> `‖W C^½‖²` of the layer as it was."""
        ...

    def reweigh(self, factors: Mapping[str, float]) -> None:
        """Multiply the shares of these sites."""
        ...

    def shares(self) -> Iterator[Float[Tensor, " n"]]:
        """Those of all sites, in order, a few at a time."""
        ...

    def kept(self) -> list[Tensor]: ...
    def sketch(self) -> list[float]: ...


def _unseen(model: nn.Module, store: CovarianceStore, whole: Iterable[str]) -> list[str]:
    """What `modules_to_save` trains and the store does not know, which is also said."""
    beside = [
        name
        for name, module in base_of(model).named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        and any(parameter.requires_grad for parameter in module.parameters())
    ]
    found = []
    for name in beside:
        layers = [layer for layer in whole if lies_in(layer, [name])] or [name]
        missing = [layer for layer in layers if layer not in store]
        if missing:
            logger.warning(
                "the anchor does not see %s, trained whole beside the adapter: the store has no covariance of %s",
                name,
                quoted(missing),
            )
        found += missing
    return found


# ------------------------------------------------------------------ what is refused


def _source(
    store: CovarianceStore | None,
    task_store: CovarianceStore | None,
    metric: AnchorMetric,
    output_side: OutputSide,
) -> CovarianceStore | None:
    """The covariances that an anchor takes; None for those of the metric "identity".

    Raises:
        CordaError: they are not given, or lack the output side.
        UnknownNameError: an unknown metric or output side.
    """
    fitted(metric, AnchorMetric, "metric")
    fitted(output_side, OutputSide, "output_side")
    check_anchor_metric(metric, output_side)
    if metric == "identity":
        return None
    source, what = {
        "knowledge": (store, "of what is to be kept"),
        "task": (task_store, "of the new task, task_store="),
    }[metric]
    if not isinstance(source, CovarianceStore):
        raise CordaError(
            f"an anchor needs the covariances {what}, and got {source!r}: pass the store of "
            "collect_covariance, or CovarianceStore.load(path)"
        )
    if output_side != "none":
        source.need_output_side()
    return source


def _chosen(
    known: Sequence[str], adapted: Sequence[str], sites: Iterable[Site | str] | None, why: str
) -> list[str]:
    """Names to anchor, in the order of those that a metric is known of; `why` it is not of others."""
    if not adapted:
        raise CordaError(
            "no layer of this model is adapted or trained, so there is nothing to anchor: attach the adapter (or set "
            "requires_grad, for full fine-tuning) before anchor_penalty"
        )
    if sites is None:
        missing = [name for name in adapted if name not in known]
        if len(missing) == len(adapted):
            raise CordaError(
                f"an anchor cannot look at any of the adapted layers, {quoted(missing)}: {why}. Known are {quoted(known)}"
            )
        if missing:
            raise CordaError(
                f"an anchor cannot look at the adapted layers {quoted(missing)}: {why}, or anchor only some layers, with sites="
            )
        return [name for name in known if name in set(adapted)]
    wanted = {site.name if isinstance(site, Site) else site for site in sites}
    if not wanted:
        raise CordaError("sites is empty: name at least one adapted layer, or leave it out for all")
    for problem, names in (
        ("not adapted, so they cannot change", wanted - set(adapted)),
        (f"not known ({why})", wanted - set(known)),
    ):
        if names:
            raise CordaError(f"layers of sites= that are {problem}: {quoted(sorted(names))}")
    return [name for name in known if name in wanted]


def _check_model(model: nn.Module, store: CovarianceStore, starts: dict[str, Adapted]) -> None:
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
    is_same = found == store.model_fingerprint or (
        not origins
        and is_made_from(model, store.model_fingerprint, store.model_signs, "the covariances")
    )
    if is_same or any(site.start for site in starts.values()):
        return
    raise ForeignFileError(
        f"the covariances were collected from the model {store.model_fingerprint}, and this one is {found}: other "
        "layers or other weights. Collect them from this model before it is trained, or build the anchor before a "
        "checkpoint is loaded"
    )
