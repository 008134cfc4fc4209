"""The plan of one site: its components decomposed by the basis of the method, and the damage predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.decompose import (
    Decomposition,
    Root,
    damp,
    decompose,
    decompose_contrast,
    decompose_error,
    decompose_gradient,
    decompose_keep_lora,
    decompose_lora_ga,
    knowledge_energy,
)
from corda_vlm.decompose.basis import float64_device
from corda_vlm.errors import CordaError
from corda_vlm.families.layers.quantized import rounded
from corda_vlm.plan.bases import Components, PlanMethod
from corda_vlm.plan.choose import (
    ChosenCovariances,
)
from corda_vlm.plan.options import PlanOptions, Route
from corda_vlm.plan.plan import SitePlan
from corda_vlm.sites import Site


@dataclasses.dataclass(frozen=True)
class Choices:
    """What is decided for all sites together, before the first is decomposed.

    Attributes:
        covariances, tasks: of the knowledge (or of what the mode takes), and of the new task beside it.
        gradient: of the new task's loss, for a basis that takes it.
        ranks: site name -> rank.
        budget: parameters that the ranks share; None where all have the same rank.
        rule: by which they share them.
        route: of `decompose`.
        beta: the weight of the knowledge against the new task, for a basis that weighs them.
        quantized: names of the layers whose weights are rounded, for a basis that takes that back.
    """

    basis: PlanMethod
    components: Components
    covariances: ChosenCovariances
    tasks: ChosenCovariances
    gradient: Mapping[str, Tensor] | None
    ranks: Mapping[str, int]
    budget: int | None
    rule: str | None
    route: Route
    beta: float | None
    quantized: Collection[str]


def plan_site(
    site: Site, weight: Float[Tensor, "out inp"], asked: PlanOptions, chosen: Choices
) -> tuple[SitePlan, Decomposition]:
    """The plan of one site, and its factors on the CPU."""
    covariance, basis, rank = chosen.covariances[site.name], chosen.basis, chosen.ranks[site.name]
    shape = (weight.shape[0], weight.shape[1])
    factor = _decomposed(site, weight, asked, chosen)
    # all eigenvalues of C': for wide inputs that costs more than the fast route's whole decomposition
    thorough = chosen.route == "exact" or asked.dynamic_covariance
    plan = SitePlan(
        site=site,
        shape=shape,
        rank=rank,
        round=chosen.covariances.rounds[site.name],
        components=chosen.components,
        side=factor.side,
        power=basis.power,
        spectrum=tuple(factor.singular_values.tolist()),
        predicted_damage=_damage(weight, factor, covariance, asked.damping, basis.power),
        floored=factor.floored,
        chosen_energy=factor.chosen_energy,
        total_energy=factor.total_energy,
        route=factor.route,
        compactness=chosen.covariances.compactness(site.name, shape[0]) if thorough else None,
        scores=chosen.covariances.scores(site.name),
        gradient_share=factor.energy_share if basis.of_gradient else None,
        tokens=None if site.pool is None else chosen.covariances.tokens(site.name),
        pooled=chosen.covariances.is_pooled(site.name),
    )
    return plan, _on_cpu(factor)


def _decomposed(
    site: Site,
    weight: Float[Tensor, "out inp"],
    asked: PlanOptions,
    chosen: Choices,
) -> Decomposition:
    """The components of a weight that are adapted, by the basis of the method."""
    basis, rank = chosen.basis, chosen.ranks[site.name]
    norms = {"damping": asked.damping, "a_norm": asked.a_norm}
    if asked.quantize_to is not None:
        how = {**norms, "rank": rank, "route": chosen.route, "seed": asked.seed}
        # of a weight that stays as it is nothing was taken: its pair starts at zero
        there = rounded(weight, asked.quantize_to) if site.name in chosen.quantized else weight
        return decompose_error(weight, there, _root(site, weight, chosen), **how)
    if basis.directions == "qr":
        return _olora(weight, rank, asked.a_norm)
    if chosen.gradient is not None:
        gradient = chosen.gradient[site.name].to(weight.device)
        return _from_gradient(site, weight, gradient, asked, chosen)
    if chosen.beta is not None:
        known, task = _there(chosen.covariances[site.name]), _there(chosen.tasks[site.name])
        return decompose_contrast(weight, known, task, rank=rank, beta=chosen.beta, **norms)
    return decompose(
        weight,
        _root(site, weight, chosen),
        rank=rank,
        components=chosen.components,
        power=basis.power,
        side=basis.side_of((weight.shape[0], weight.shape[1]), asked.side),
        route=chosen.route,
        seed=asked.seed,
        **norms,
    )


def _root(site: Site, like: Tensor, chosen: Choices) -> Root | None:
    """The root of the site's covariance at the power of the method, where `like` is computed with; None without one."""
    if not chosen.basis.needs_store:
        return None
    return chosen.covariances.root(site.name, chosen.basis.power, float64_device(like))


def _from_gradient(
    site: Site,
    weight: Float[Tensor, "out inp"],
    gradient: Float[Tensor, "out inp"],
    asked: PlanOptions,
    chosen: Choices,
) -> Decomposition:
    """The start that the gradient of the new task's loss gives."""
    how: dict[str, Any] = {
        "rank": chosen.ranks[site.name],
        "a_norm": asked.a_norm,
        "route": chosen.route,
        "seed": asked.seed,
    }
    try:
        match chosen.basis.directions:
            case "gradient-pair":
                return decompose_lora_ga(gradient, **how)
            case "gradient-rest":
                covariance = _there(chosen.covariances[site.name])
                return decompose_keep_lora(gradient, weight, covariance, **how)
            case _:
                root = _root(site, gradient, chosen)
                return decompose_gradient(gradient, root, damping=asked.damping, **how)
    except CordaError as error:
        raise CordaError(f"site {site.name!r}: {error}") from error


def _there(covariance: Tensor | None) -> Tensor:
    assert covariance is not None  # checked by `_check_stores`
    return covariance


def _damage(
    weight: Float[Tensor, "out inp"],
    factor: Decomposition,
    covariance: Float[Tensor, "inp inp"] | None,
    damping: float,
    power: float,
) -> float | None:
    """`‖B A C'‖² / ‖W C'‖²`; None without data, and where B starts at zero, so that nothing is adapted yet."""
    if covariance is None or not factor.B.any():
        return None
    if power == 1:  # the decomposition has both
        return factor.energy_share
    damped = damp(covariance.to(weight.device), damping)
    whole = float((weight.to(damped.dtype) @ damped).norm()) ** 2
    part = knowledge_energy((factor.B, factor.A), damped) ** 2
    return part / whole if whole > 0 else 0.0


def _olora(weight: Float[Tensor, "out inp"], rank: int, a_norm: float | None) -> Decomposition:
    """OLoRA: `W = Q R`, `B = Q[:, :r]`, `A = R[:r]`. Its values are the norms of A's rows."""
    Q, R = torch.linalg.qr(weight.double())
    B, A = Q[:, :rank], R[:rank]
    norms = A.norm(dim=1)
    if a_norm is not None:
        scale = a_norm / norms.clamp_min(torch.finfo(torch.float32).tiny)
        B, A = B / scale, A * scale[:, None]
    return Decomposition(
        B=B,
        A=A,
        singular_values=norms,
        spectrum=None,
        total_energy=float(R.norm()),
        chosen_energy=float(norms.norm()),
        floored=0,
        side="output",
        route="exact",
    )


def _on_cpu(factor: Decomposition) -> Decomposition:
    moved = {
        f.name: getattr(factor, f.name).detach().to("cpu", torch.float32).contiguous()
        for f in dataclasses.fields(factor)
        if isinstance(getattr(factor, f.name), Tensor)
    }
    return dataclasses.replace(factor, **moved)
