"""Make a plan: choose covariances and ranks, decompose, predict the damage."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from corda_vlm.covariance import CovarianceStore, GradientStore
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
from corda_vlm.decompose.gradient import check_pair_rank
from corda_vlm.distributed.agree import is_first, same_everywhere
from corda_vlm.distributed.values import dealt_out
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.families import any_family
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.layers.quantized import rounded
from corda_vlm.families.loading.quantization import quantizable
from corda_vlm.families.options import SiteOptions
from corda_vlm.names import quoted
from corda_vlm.options import as_keywords, options_from
from corda_vlm.plan.bases import MODES, PLAN_METHODS, Components, PlanMethod
from corda_vlm.plan.choose import (
    ChosenCovariances,
    choose_covariances,
    costs_of,
    rank_budget,
)
from corda_vlm.plan.experts import StackGradients, check_one_rank, stacks_of
from corda_vlm.plan.options import AUTO, PlanKeywords, PlanOptions, Route, needs_gradient, rule_of
from corda_vlm.plan.plan import AdapterPlan, SitePlan
from corda_vlm.plan.share import ceilings, choose_ranks
from corda_vlm.progress import showing
from corda_vlm.ranks.rules import get_rank_rule
from corda_vlm.same_model import is_made_from, model_signs, need_original
from corda_vlm.sites import Site, SiteWeights, find_sites, model_fingerprint, site_weights

logger = logging.getLogger(__name__)


def plan_adapter(
    model: nn.Module,
    store: CovarianceStore | None,
    *,
    task_store: CovarianceStore | None = None,
    gradient: GradientStore | None = None,
    show_progress: bool = True,
    **options: Unpack[PlanKeywords],
) -> AdapterPlan:
    """Decide, and decompose: which directions of which weight matrices are adapted. The model is not changed.

    The processes of a distributed run deal the sites out to each other, and each ends with the same plan, to the bit: that of a
    single process. All of them have to call this.

    Args:
        model: bare; packed attention is unpacked meanwhile.
        store: covariances of the knowledge to keep, or of the new task for mode "ipm". May be None for
            "pissa", "milora", "olora" and "loftq"; if given, it predicts their damage.
        task_store: covariances of the new task beside those of the knowledge; for "sc-lora" only.
        gradient: of the new task's loss, from `collect_gradient`; for "corda-natural", "lora-ga" and "keep-lora", and for
            rank rules that look at it.
        options: of `PlanOptions`.

    Raises:
        UnknownNameError: unknown method, mode, side, tower or role.
        NoSitesError: towers, roles and targets leave no site.
        ForeignFileError: a store was made from another model.
        CordaError: a rank outside 1 to min(out, inp), a budget that no ranks meet, a damping, a_norm or beta out of
            range, a site that a store did not calibrate, a store that is missing, an option or a store that the
            method does not take; or processes of a distributed run that plan different things, or of which one failed.
    """
    asked = options_from(PlanOptions, options, "plan_adapter").settled(gradient is not None)
    basis = PLAN_METHODS[asked.method]
    if asked.rank_rule == "compactness" and options.get("rank_rule", AUTO) == AUTO:
        logger.warning(
            "ranks are shared out by compactness, which kept less than equal ranks here; give the gradient of the new task's "
            "loss (gradient=, --gradient) for ranks by the task, or leave dynamic_rank out"
        )
    _check_stores(asked, basis, store, task_store, gradient)
    if basis.corrects:
        need_original(model)
    fingerprint = model_fingerprint(model)
    made_from = ((store, "covariances"), (task_store, "task's covariances"), (gradient, "gradient"))
    for given, of in made_from:
        if given is not None:
            check_made_from(model, given, of)
    _check_processes(fingerprint, asked, *(given for given, _ in made_from))
    sites = find_sites(model, **as_keywords(asked, SiteOptions))
    stacks = stacks_of(model, sites)
    check_one_rank(stacks, rule_of(asked.method, asked) if asked.dynamic_rank else None)
    of_sites = None if gradient is None else StackGradients(gradient, stacks)
    quantized = _quantized(model, sites, asked)
    with showing(show_progress and is_first()), unpacked(model):
        sites = _reached(sites, gradient, of_sites)
        weights = site_weights(model, [site.name for site in sites])
        chosen = _choose(weights, asked, store, task_store, of_sites, quantized)
        planned = _plan_sites(sites, weights, asked, chosen)
    of_task = gradient if task_store is None else task_store
    return AdapterPlan(
        method=asked.method,
        mode=asked.mode if basis.components is None else None,
        rank=asked.rank,
        budget=chosen.budget,
        rank_rule=chosen.rule,
        damping=asked.damping,
        a_norm=asked.a_norm,
        beta=chosen.beta,
        model_fingerprint=fingerprint,
        model_signs=model_signs(model),
        quantize_to=asked.quantize_to,
        data_fingerprint=store.data_fingerprint if store is not None else None,
        task_fingerprint=of_task.data_fingerprint if of_task is not None else None,
        family=any_family(model).name,
        sites=tuple(plan for plan, _ in planned),
        factors={plan.site.name: factor for plan, factor in planned},
    )


def _check_processes(
    fingerprint: str, asked: PlanOptions, *stores: CovarianceStore | GradientStore | None
) -> None:
    """Raise `CordaError`, on every process of a distributed run alike, unless all plan the same."""
    made_from = [None if store is None else store.data_fingerprint for store in stores]
    same_everywhere(
        "what is to be planned",
        {
            "the model": fingerprint,
            "the data of the stores": made_from,
            **dataclasses.asdict(asked),
        },
        "They deal the sites out to each other: give all of them the same model, stores and options",
    )


def _plan_sites(
    sites: Sequence[Site], weights: SiteWeights, asked: PlanOptions, chosen: _Choices
) -> list[tuple[SitePlan, Decomposition]]:
    """The plan of each site in order, with its factors; several processes do this between them."""
    by_name = {site.name: site for site in sites}
    groups = chosen.covariances.groups(weights)

    def make(group: str) -> dict[str, tuple[SitePlan, Decomposition]]:
        return {
            name: _plan_site(by_name[name], weights[name], asked, chosen) for name in groups[group]
        }

    types = (SitePlan, Site, Decomposition)
    planned = dealt_out("plan", groups, costs_of(groups, weights.shapes), make, types)
    return [planned[site.name] for site in sites]


def _quantized(model: nn.Module, sites: Sequence[Site], asked: PlanOptions) -> frozenset[str]:
    """The layers that quantising rounds, for a method that takes that back: a log line says which sites are none.

    Raises:
        CordaError: no site is one.
    """
    if asked.quantize_to is None:
        return frozenset()
    found = quantizable(model, asked.quantize_to)
    left = [site.name for site in sites if site.name not in found]
    if len(left) == len(sites):
        raise CordaError(
            f"method {asked.method!r} takes back what quantising to {asked.quantize_to} takes off the weights, and the "
            f"{len(sites)} sites keep theirs as they are: {quoted(left)}. Take another method, or other sites"
        )
    if left:
        logger.warning(
            "%d of %d sites keep their weights as they are where the model is quantised, so that their adapters start at zero: %s",
            len(left),
            len(sites),
            quoted(left),
        )
    return found


def _reached(
    sites: list[Site], gradient: GradientStore | None, of_sites: Mapping[str, Tensor] | None
) -> list[Site]:
    """Those of which the gradient was asked for and has something; the loss does not depend on the others."""
    if gradient is None or of_sites is None:
        return sites
    unreached = set(gradient.asked) - set(of_sites)
    if left := [site.name for site in sites if site.name in unreached]:
        logger.warning(
            "%d of %d sites are not adapted, as the new task's loss does not depend on them: %s",
            len(left),
            len(sites),
            quoted(left),
        )
    return [site for site in sites if site.name not in unreached]


@dataclasses.dataclass(frozen=True)
class _Choices:
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


def _choose(
    weights: SiteWeights,
    asked: PlanOptions,
    store: CovarianceStore | None,
    task_store: CovarianceStore | None,
    gradient: Mapping[str, Tensor] | None,
    quantized: Collection[str],
) -> _Choices:
    basis = PLAN_METHODS[asked.method]
    components = basis.components or MODES[asked.mode]
    shapes = weights.shapes
    if asked.budget is None:
        check_rank(shapes, asked.rank)
    budget = rank_budget(
        shapes,
        asked.rank,
        dynamic_rank=asked.dynamic_rank,
        budget=asked.budget,
        min_rank=asked.min_rank,
        max_rank=ceilings(asked, shapes) if asked.dynamic_rank else asked.max_rank,
    )
    covariances = choose_covariances(weights, store, asked.damping, asked.dynamic_covariance)
    ranks, rule = dict.fromkeys(weights, asked.rank), rule_of(asked.method, asked)
    if rule is not None and budget is not None:
        ranks = choose_ranks(
            weights,
            covariances,
            gradient,
            asked,
            rule=rule,
            components=components,
            budget=budget,
        )
    return _Choices(
        basis,
        components,
        covariances,
        tasks=choose_covariances(weights, task_store, asked.damping, False),
        gradient=gradient if basis.of_gradient else None,
        ranks=ranks,
        budget=budget,
        rule=rule,
        # whole spectra were taken already
        route="exact" if rule and "spectrum" in get_rank_rule(rule).needs else asked.route,
        beta=(0.5 if asked.beta is None else asked.beta) if basis.contrast else None,
        quantized=quantized,
    )


def _plan_site(
    site: Site, weight: Float[Tensor, "out inp"], asked: PlanOptions, chosen: _Choices
) -> tuple[SitePlan, Decomposition]:
    """The plan of one site, and its factors on the CPU."""
    covariance, basis, rank = chosen.covariances[site.name], chosen.basis, chosen.ranks[site.name]
    shape = (weight.shape[0], weight.shape[1])
    factor = _decomposed(site, weight, covariance, asked, chosen)
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
    covariance: Float[Tensor, "inp inp"] | None,
    asked: PlanOptions,
    chosen: _Choices,
) -> Decomposition:
    """The components of a weight that are adapted, by the basis of the method."""
    basis, rank = chosen.basis, chosen.ranks[site.name]
    norms = {"damping": asked.damping, "a_norm": asked.a_norm}
    if asked.quantize_to is not None:
        how = {**norms, "rank": rank, "route": chosen.route, "seed": asked.seed}
        given = _there(covariance) if basis.needs_store else None
        # of a weight that stays as it is nothing was taken: its pair starts at zero
        there = rounded(weight, asked.quantize_to) if site.name in chosen.quantized else weight
        return decompose_error(weight, there, given, **how)
    if basis.directions == "qr":
        return _olora(weight, rank, asked.a_norm)
    if chosen.gradient is not None:
        gradient = chosen.gradient[site.name].to(weight.device)
        return _from_gradient(site, weight, gradient, asked, chosen)
    if chosen.beta is not None:
        task = _there(chosen.tasks[site.name])
        return decompose_contrast(
            weight, _there(covariance), task, rank=rank, beta=chosen.beta, **norms
        )
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


def _root(site: Site, like: Tensor, chosen: _Choices) -> Root | None:
    """The root of the site's covariance at the power of the method, where `like` is computed with; None without one."""
    if not chosen.basis.needs_store:
        return None
    return chosen.covariances.root(site.name, chosen.basis.power, float64_device(like))


def _from_gradient(
    site: Site,
    weight: Float[Tensor, "out inp"],
    gradient: Float[Tensor, "out inp"],
    asked: PlanOptions,
    chosen: _Choices,
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


def _check_stores(
    asked: PlanOptions,
    basis: PlanMethod,
    store: CovarianceStore | None,
    task_store: CovarianceStore | None,
    gradient: GradientStore | None,
) -> None:
    """Raise a `CordaError` for covariances that the method needs and is not given, or is given and does not take."""
    method = asked.method
    if store is None and basis.needs_store:
        raise CordaError(
            f"method {method!r} takes its directions from data: pass the store of collect_covariance. "
            f"Without data: {', '.join(sorted(m for m, b in PLAN_METHODS.items() if not b.needs_store))}."
        )
    if basis.contrast and task_store is None:
        raise CordaError(
            f"method {method!r} weighs the new task against the knowledge: pass the covariances of the new task as "
            "task_store=, beside those of the knowledge in store"
        )
    _check_gradient(asked, basis, gradient)
    if not basis.contrast and task_store is not None:
        raise CordaError(
            f"method {method!r} takes one store of covariances; leave task_store= out"
            + (", and for mode='ipm' pass the task's as store" if basis.components is None else "")
        )


def _check_gradient(asked: PlanOptions, basis: PlanMethod, gradient: GradientStore | None) -> None:
    method = asked.method
    if needs_gradient(method, asked) == (gradient is not None):
        return
    if gradient is not None:
        takers = ", ".join(sorted(m for m, b in PLAN_METHODS.items() if b.of_gradient))
        raise CordaError(
            f"method {method!r} takes no gradient; leave gradient= out, or take one of {takers}, or share ranks out by a rule "
            "that looks at it: dynamic_rank=True, rank_rule='task'"
        )
    why = f"method {method!r}" if basis.of_gradient else f"rank rule {rule_of(method, asked)!r}"
    raise CordaError(
        f"{why} looks at the gradient of the new task's loss: pass gradient=, from task_gradient or collect_gradient "
        "(corda-vlm gradient, and plan --gradient)"
    )


def check_made_from(model: nn.Module, store: CovarianceStore | GradientStore, of: str) -> None:
    """Raise a `ForeignFileError` unless the store was collected from this model, or from one as of `same_model`."""
    if not is_made_from(model, store.model_fingerprint, store.model_signs, f"the {of}"):
        raise ForeignFileError(
            f"the {of} were collected from the model {store.model_fingerprint}, and this one is "
            f"{model_fingerprint(model)}: collect them from this model, or load that one"
        )


def check_rank(shapes: Mapping[str, tuple[int, int]], rank: int, method: str = "") -> None:
    """Raise a `CordaError` that names the first site whose (out, inp) weight cannot have this rank, by this method."""
    basis = PLAN_METHODS.get(method)
    for name, (out, inp) in shapes.items():
        if basis is not None and basis.directions == "gradient-pair":
            check_pair_rank((out, inp), rank, f"site {name!r}: ")
        if not 1 <= rank <= min(out, inp):
            raise CordaError(
                f"site {name!r}: rank {rank} is outside 1 to {min(out, inp)}, the full rank of its {out}×{inp} weight; "
                "choose a rank within, or leave the site out with towers= or roles="
            )


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
