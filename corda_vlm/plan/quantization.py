"""What quantising the weights of a model costs, site by site, of each way to start an adapter on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from corda_vlm.covariance import CovarianceStore
from corda_vlm.decompose import RoundingError, rounding_error
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.layers.quantized import rounded
from corda_vlm.families.loading.quantization import quantizable
from corda_vlm.families.options import Quantization
from corda_vlm.plan.bases import PLAN_METHODS
from corda_vlm.plan.checks import check_made_from
from corda_vlm.plan.plan import AdapterPlan
from corda_vlm.progress import showing, track
from corda_vlm.same_model import need_original
from corda_vlm.sites import Site, find_sites, site_weights
from corda_vlm.text_table import text_table

UNTOUCHED, RESIDUAL, CORRECTED = "Q(W)", "Q(W − B₀A₀) + B₀A₀", "Q(W) + B A"


@dataclass(frozen=True)
class QuantizationErrors:
    """How far the layers of a quantised model start from the original; `str` of it is a table.

    Attributes:
        kind: "nf4" or "int8".
        errors: way -> site name -> error. The ways are "Q(W)", the untouched base; of a plan "Q(W − B₀A₀) + B₀A₀", the residual base
            that is quantised, or "Q(W) + B A", where the plan is of a method that corrects the error.
        sites: in the model's order.
    """

    kind: Quantization
    errors: Mapping[str, Mapping[str, RoundingError]]
    sites: tuple[Site, ...]

    def total(self, way: str) -> RoundingError:
        """Over all sites: energies added up."""
        return _added(self.errors[way].values())

    def table(self) -> str:
        """A row for each role of a tower, and the model's: relative errors of the weight, and of the outputs where C is known."""
        groups: dict[tuple[str, str], list[str]] = {}
        for site in self.sites:
            groups.setdefault((site.tower, site.role), []).append(site.name)
        parts = [(*key, names) for key, names in groups.items()]
        parts.append(("all", "", [site.name for site in self.sites]))
        has_outputs = self.total(UNTOUCHED).outputs is not None
        rows = []
        for tower, role, names in parts:
            cells = [tower, role, str(len(names))]
            for found in self.errors.values():
                error = _added(found[name] for name in names)
                cells.append(f"{100 * error.relative:.2f} %")
                if has_outputs:
                    cells.append(f"{100 * (error.relative_outputs or 0):.2f} %")
            rows.append(cells)
        ways = [
            heading
            for way in self.errors
            for heading in (way, *(["of the outputs"] if has_outputs else []))
        ]
        headings = ("tower", "role", "sites", *ways)
        right = (False, False, *[True] * (len(headings) - 2))
        return (
            f"{text_table(rows, headings, right)}\n\nrelative errors against the original weights, of {self.kind}: "
            "‖W − V‖ / ‖W‖"
            + (", and of the outputs ‖(W − V) C^½‖ / ‖W C^½‖" if has_outputs else "")
        )

    def __str__(self) -> str:
        return self.table()


def quantization_errors(
    model: nn.Module,
    kind: Quantization,
    *,
    store: CovarianceStore | None = None,
    plan: AdapterPlan | None = None,
    show_progress: bool = True,
) -> QuantizationErrors:
    """How far the layers of this model start from its weights once they are quantised; nothing is changed.

    Args:
        model: the original, bare.
        store: covariances, for the errors of the outputs on that data.
        plan: whose sites are looked at, and whose pair is taken out before, or added after, quantising; None for all sites and for
            the untouched base alone.

    Raises:
        CordaError: the model is quantised already, or bitsandbytes is not installed.
        ForeignFileError: store or plan are of another model.
    """
    need_original(model)
    if store is not None:
        check_made_from(model, store, "covariances")
    if plan is not None:
        plan.check(model)
    sites = find_sites(model)
    if plan is not None:
        sites = [site.site for site in plan.sites]
    changed = quantizable(model, kind)
    errors: dict[str, dict[str, RoundingError]] = {}
    with showing(show_progress), unpacked(model):
        weights = site_weights(model, [site.name for site in sites])
        for site in track(sites, "quantize", unit="site"):
            weight = weights[site.name]
            covariance = None if store is None else store[site.name].matrix
            as_kept = partial(rounded, kind=kind) if site.name in changed else _as_it_is
            for way, start in _starts(site.name, weight, as_kept, plan).items():
                found = errors.setdefault(way, {})
                found[site.name] = rounding_error(weight, start, covariance)
    return QuantizationErrors(kind, errors, tuple(sites))


def _as_it_is(weight: Tensor) -> Tensor:
    """Of a layer that quantising leaves alone: an expert in a stack, a part of packed attention, a convolution."""
    return weight


def _starts(
    name: str, weight: Tensor, as_kept: Callable[[Tensor], Tensor], plan: AdapterPlan | None
) -> dict[str, Tensor]:
    """Way -> what the layer multiplies by at the start of training.

    Args:
        as_kept: what becomes of a weight where the model is quantised.
    """
    plain = as_kept(weight)
    if plan is None:
        return {UNTOUCHED: plain}
    factor = plan.factors[name]
    product = (factor.B.double() @ factor.A.double()).to(weight.device)
    if PLAN_METHODS[plan.method].corrects:
        return {UNTOUCHED: plain, CORRECTED: plain.double() + product}
    left = as_kept((weight.double() - product).to(weight.dtype))
    return {UNTOUCHED: plain, RESIDUAL: left.double() + product}


def _added(errors: Iterable[RoundingError]) -> RoundingError:
    found = list(errors)
    outputs = [(e.outputs, e.of_outputs) for e in found]
    sums = (sum(e.weight for e in found), sum(e.of_weight for e in found))
    if any(part is None for part, _ in outputs):
        return RoundingError(*sums)
    return RoundingError(
        *sums, sum(part or 0.0 for part, _ in outputs), sum(whole or 0.0 for _, whole in outputs)
    )
