"""Which rank each site takes, where a budget is shared out: what the rule looks at is measured site by site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm import ranks
from corda_vlm.decompose import decompose, gradient_spectrum
from corda_vlm.distributed.values import dealt_out
from corda_vlm.errors import CordaError
from corda_vlm.plan.bases import PLAN_METHODS, Components
from corda_vlm.plan.choose import ChosenCovariances, costs_of
from corda_vlm.plan.options import PlanOptions
from corda_vlm.ranks.rules import Need
from corda_vlm.sites import SiteWeights

MOST = 8
"""Times the rank that all would have if all had the same: the most that the gradient's rule gives without a `max_rank`, so that
of a large matrix only so many components have to be found. On emoji-clip it gave up to 3.3 times."""


def choose_ranks(
    weights: SiteWeights,
    covariances: ChosenCovariances,
    gradient: Mapping[str, Tensor] | None,
    asked: PlanOptions,
    *,
    rule: str,
    components: Components,
    budget: int,
) -> dict[str, int]:
    """Site -> rank: the budget shared out by a rule, see `ranks.share_out`.

    A first pass for the numbers alone: holding every site's whole basis would take the model's size.

    Raises:
        CordaError: as `ranks.share_out`; or a site without a gradient, for a rule that looks at it.
    """
    needs = ranks.get_rank_rule(rule).needs
    shapes = weights.shapes
    equal = max(1, budget // sum(map(sum, shapes.values())))
    bounds = {"min_rank": asked.min_rank, "max_rank": ceilings(asked, shapes)}
    if bounds["max_rank"] is None and "gradient" in needs:
        most = _ceiling(shapes, budget, MOST * equal)
        bounds["max_rank"] = max(most, _largest(asked.min_rank))
    allowed = ranks.check_budget(shapes, budget, **bounds)

    def seen(name: str) -> dict[str, Any]:
        weight = weights[name]
        of_task = None if gradient is None else gradient[name].to(weight.device)
        look = _Look(name, weight, covariances, of_task, asked, components, equal, allowed[name][1])
        try:
            return {need: look.at(need) for need in needs}
        except CordaError as error:
            said = str(error)
            raise CordaError(said if name in said else f"site {name!r}: {said}") from error

    groups = covariances.groups(weights)

    def look_at(group: str) -> dict[str, dict[str, Any]]:
        return {name: seen(name) for name in groups[group]}

    every = dealt_out("spectra", groups, costs_of(groups, shapes), look_at)
    views = {name: ranks.SiteView(shapes[name], **every[name]) for name in weights}
    return ranks.share_out(
        views,
        rule=rule,
        mode="kpm" if components == "smallest" else "ipm",
        budget=budget,
        **bounds,
    )


def _ceiling(shapes: Mapping[str, ranks.Shape], budget: int, most: int) -> int:
    """`most`, or twice that as often as the budget takes: small matrices may hold too little of it."""
    highest = max(min(shape) for shape in shapes.values())
    while most < highest and budget > sum(
        sum(shape) * min(most, min(shape) - 1) for shape in shapes.values()
    ):
        most *= 2
    return most


def _largest(bound: ranks.Bound | None) -> int:
    return max(bound.values(), default=1) if isinstance(bound, Mapping) else bound or 1


def ceilings(asked: PlanOptions, shapes: Mapping[str, ranks.Shape]) -> ranks.Bound | None:
    """`max_rank`, for a method that takes two components a rank no more than half the full rank."""
    if PLAN_METHODS[asked.method].directions != "gradient-pair":
        return asked.max_rank
    given = asked.max_rank
    halves = {site: max(1, min(shape) // 2) for site, shape in shapes.items()}
    if given is None:
        return halves
    if isinstance(given, int):
        return {site: min(given, half) for site, half in halves.items()}
    return {**given, **{site: min(given.get(site, half), half) for site, half in halves.items()}}


@dataclass(frozen=True)
class _Look:
    """What there is to see of one site, each computed when it is asked for.

    Attributes:
        equal: the rank that all sites would have if all had the same.
        most: the highest that this one may have.
    """

    site: str
    weight: Float[Tensor, "out inp"]
    covariances: ChosenCovariances
    of_task: Float[Tensor, "out inp"] | None
    asked: PlanOptions
    components: Components
    equal: int
    most: int

    def at(self, need: Need) -> Tensor | float | None:
        match need:
            case "spectrum":
                return self._spectrum()
            case "log_compactness":
                return math.log(self._compactness())
            case "gradient":
                return self._gradient()
            case "output_energy":
                return self._output_energy()
            case "task_energy":
                return self._task_energy()

    def _spectrum(self) -> Float[Tensor, " R"]:
        if self.site in self.covariances.selections:
            return self.covariances.selections[self.site].spectrum
        covariance = self.covariances[self.site]
        assert covariance is not None  # a method that has rounds has a store
        return ranks.spectrum(self.weight, covariance, damping=self.asked.damping)

    def _compactness(self) -> float:
        found = self.covariances.compactness(self.site, len(self.weight))
        assert found is not None
        return found

    def _gradient(self) -> Float[Tensor, " n"]:
        basis = PLAN_METHODS[self.asked.method]
        in_metric = basis.directions != "gradient-pair"
        return gradient_spectrum(
            self._given(),
            self.covariances[self.site] if in_metric else None,
            self.weight if basis.directions == "gradient-rest" else None,
            count=self.most,
            damping=self.asked.damping,
            route=self.asked.route,
            seed=self.asked.seed,
        )

    def _output_energy(self) -> float | None:
        """In the metric that the directions are taken in; in none, as LoRA-GA and KeepLoRA take them, that of the weight, so that
        the unit of a layer's inputs does not count."""
        if PLAN_METHODS[self.asked.method].directions in ("gradient-pair", "gradient-rest"):
            return float(self.weight.double().square().sum())
        covariance = self.covariances[self.site]
        if covariance is None:
            return None
        c = covariance.to(self.weight.device, torch.float64)
        w = self.weight.to(c)
        damping = self.asked.damping * float(c.diagonal().mean())
        return float(((w @ c) * w).sum()) + damping * float(w.square().sum())

    def _task_energy(self) -> float:
        """A is found as for a plan of equal ranks, its rows at norm 1."""
        basis = PLAN_METHODS[self.asked.method]
        rows = decompose(
            self.weight,
            self.covariances[self.site],
            rank=min(self.equal, *self.weight.shape),
            components=self.components,
            power=basis.power,
            side=basis.side_of((self.weight.shape[0], self.weight.shape[1]), self.asked.side),
            damping=self.asked.damping,
            a_norm=1.0,
            route=self.asked.route,
            seed=self.asked.seed,
        ).A
        given = self._given()
        return float((given @ rows.to(given).mT).double().square().sum())

    def _given(self) -> Float[Tensor, "out inp"]:
        assert self.of_task is not None  # checked before the work
        return self.of_task
