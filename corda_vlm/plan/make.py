"""Make a plan: choose covariances and ranks for all sites, and plan each."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn
from typing_extensions import Unpack

from corda_vlm.covariance import CovarianceStore, GradientStore
from corda_vlm.decompose import (
    Decomposition,
)
from corda_vlm.distributed.agree import is_first
from corda_vlm.distributed.values import dealt_out
from corda_vlm.errors import CordaError
from corda_vlm.families import any_family
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.loading.quantization import quantizable
from corda_vlm.families.options import SiteOptions
from corda_vlm.names import quoted
from corda_vlm.options import as_keywords, options_from
from corda_vlm.plan.bases import MODES, PLAN_METHODS
from corda_vlm.plan.checks import check_made_from, check_processes, check_rank, check_stores
from corda_vlm.plan.choose import (
    choose_covariances,
    costs_of,
    rank_budget,
)
from corda_vlm.plan.experts import StackGradients, check_one_rank, stacks_of
from corda_vlm.plan.options import AUTO, PlanKeywords, PlanOptions, rule_of
from corda_vlm.plan.plan import AdapterPlan, SitePlan
from corda_vlm.plan.share import ceilings, choose_ranks
from corda_vlm.plan.site import Choices, plan_site
from corda_vlm.progress import showing
from corda_vlm.ranks.rules import get_rank_rule
from corda_vlm.same_model import model_signs, need_original
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
    check_stores(asked, basis, store, task_store, gradient)
    if basis.corrects:
        need_original(model)
    fingerprint = model_fingerprint(model)
    made_from = ((store, "covariances"), (task_store, "task's covariances"), (gradient, "gradient"))
    for given, of in made_from:
        if given is not None:
            check_made_from(model, given, of)
    check_processes(fingerprint, asked, *(given for given, _ in made_from))
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


def _plan_sites(
    sites: Sequence[Site], weights: SiteWeights, asked: PlanOptions, chosen: Choices
) -> list[tuple[SitePlan, Decomposition]]:
    """The plan of each site in order, with its factors; several processes do this between them."""
    by_name = {site.name: site for site in sites}
    groups = chosen.covariances.groups(weights)

    def make(group: str) -> dict[str, tuple[SitePlan, Decomposition]]:
        return {
            name: plan_site(by_name[name], weights[name], asked, chosen) for name in groups[group]
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


def _choose(
    weights: SiteWeights,
    asked: PlanOptions,
    store: CovarianceStore | None,
    task_store: CovarianceStore | None,
    gradient: Mapping[str, Tensor] | None,
    quantized: Collection[str],
) -> Choices:
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
    return Choices(
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
