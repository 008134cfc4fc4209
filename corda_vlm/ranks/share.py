"""A budget of parameters shared out as ranks, in the order of a rule's scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.ranks.budget import Bound, Shape, check_budget, uniform_budget
from corda_vlm.ranks.rules import RankRule, get_rank_rule
from corda_vlm.ranks.spectra import checked, checked_values
from corda_vlm.ranks.view import SiteView

MODES = ("ipm", "kpm")


def allocate_ranks(
    spectra: Mapping[str, Float[Tensor, " _R"]],
    compactness: Mapping[str, float],
    shapes: Mapping[str, Shape],
    *,
    rule: str = "compactness",
    mode: str = "kpm",
    budget: int | None = None,
    uniform_rank: int | None = None,
    min_rank: Bound | None = None,
    max_rank: Bound | None = None,
) -> dict[str, int]:
    """Site -> rank by a rule that looks at the knowledge alone, see `share_out`.

    Args:
        spectra: site -> all R singular values of `W C'`, descending.
        compactness: site -> π of the covariance that the site takes.
        shapes: site -> (out, inp) of its weight. The three mappings name the same sites.
        uniform_rank: in place of `budget`: as many parameters as that rank has everywhere.

    Raises:
        UnknownNameError: an unknown mode or rule, or a site that has no spectrum.
        CordaError: neither or both of `budget` and `uniform_rank`, a compactness below 1, or as `share_out`.
    """
    _check_names(spectra, compactness=compactness, shapes=shapes)
    if budget is None and uniform_rank is not None:
        budget = uniform_budget(shapes, uniform_rank)
    elif budget is None or uniform_rank is not None:
        raise CordaError("give either budget (in parameters) or uniform_rank, and not both")
    check_budget(shapes, budget, min_rank=min_rank, max_rank=max_rank)
    views = {}
    for site in spectra:
        full = min(shapes[site])
        sigma, log_pi = checked(spectra[site], compactness[site], full, f"site {site!r}")
        views[site] = SiteView(shapes[site], sigma, log_pi)
    return share_out(
        views, rule=rule, mode=mode, budget=budget, min_rank=min_rank, max_rank=max_rank
    )


def share_out(
    views: Mapping[str, SiteView],
    *,
    rule: str,
    mode: str,
    budget: int,
    min_rank: Bound | None = None,
    max_rank: Bound | None = None,
) -> dict[str, int]:
    """Site -> rank: a budget of parameters shared out so that `Σ (out + inp) · rank ≤ budget`.

    A rule of the knowledge filters: every site filters its r = 1 smallest components; then, again and again, the site
    with the lowest score s(r) filters one more. KPM adapts what is filtered and stops before it would exceed the
    budget; IPM adapts what is left and stops once it is within. A rule that grows gives every adapter a rank of 1, and
    then, again and again, one more to that of the lowest score, whatever the mode.

    - The paper's KPM oversteps by one rank, and its IPM stops strictly below the budget. Here the
      budget is never exceeded, and may be met exactly in both modes.
    - A step that does not fit ends the allocation, as in the paper: cheaper sites further down would
      be served for their size, against the scores. So less than one rank of the largest site stays
      unspent, unless all sites are full, and a larger budget never takes a rank from a site.
    - Equal scores go by site name: the order of the mappings does not matter.
    - A rule's s(r) never falls as r grows, so the greedy order is the sorted order of all (site, r):
      one stable sort in place of a heap and a million steps.

    Args:
        views: site -> what the rule sees of it.
        rule: key of `RANK_RULES`.
        budget: parameters.
        min_rank, max_rank: floor and ceiling of the ranks, for all sites or by name, always within 1 to
            R − 1 (a higher ceiling is lowered to that).

    Raises:
        UnknownNameError: an unknown mode or rule.
        CordaError: a budget outside what floors and ceilings allow, a floor above its ceiling, a view without what the
            rule needs, values that are incomplete, not descending or not finite, or scores that fall.
    """
    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    found = get_rank_rule(rule)
    shapes = {site: view.shape for site, view in views.items()}
    bounds = check_budget(shapes, budget, min_rank=min_rank, max_rank=max_rank)
    grows = found.grows or mode == "kpm"  # a step adds a rank, or takes one away
    sites = sorted(views)
    price = torch.tensor([views[site].price for site in sites])  # (n,) parameters of one rank
    lowest, highest = torch.tensor([bounds[site] for site in sites]).unbind(1)
    least, most = int(price @ lowest), int(price @ highest)
    # per site, the scores of its steps in the order it would take them
    scores = [_scores(rule, found, site, views[site], bounds[site], grows) for site in sites]
    order = torch.cat(scores).argsort(stable=True)
    owner = torch.arange(len(sites)).repeat_interleave(highest - lowest)[order]
    after = price[owner].cumsum(0)  # parameters moved by the steps up to and with this one
    fits = least + after <= budget if grows else most - after + price[owner] > budget
    steps = owner[: int(fits.sum())].bincount(minlength=len(sites))
    ranks = lowest + steps if grows else highest - steps
    shared = dict(zip(sites, ranks.tolist(), strict=True))
    return {site: shared[site] for site in views}


def _scores(
    name: str, rule: RankRule, site: str, view: SiteView, bounds: tuple[int, int], grows: bool
) -> Float[Tensor, " n"]:
    """The scores of a site's steps from one of its bounds to the other."""
    low, high = bounds
    for need in rule.needs:
        value = getattr(view, need)
        if value is None and need != "output_energy":  # which counts as 1
            raise CordaError(
                f"site {site!r}: rank rule {name!r} needs its {need}, which is not given"
            )
        if isinstance(value, Tensor):
            some = need == "gradient" and high <= len(value)  # as many as may be asked for
            checked_values(value, len(value) if some else view.full, f"site {site!r}")
        elif value is not None and not 0 <= value < math.inf:
            raise CordaError(
                f"site {site!r}: its {need} is {value:g}, and a finite number of 0 or more is needed; collect what it is made "
                "from again"
            )
    first = low if grows else view.full - high
    scores = rule.score(view, first + torch.arange(high - low))
    if scores.shape != (high - low,) or scores.isnan().any():
        raise CordaError(
            f"site {site!r}: rank rule {name!r} gave scores of shape {tuple(scores.shape)} for {high - low} steps, or NaN; "
            "one number a step is needed"
        )
    if (scores[1:] < scores[:-1]).any():
        raise CordaError(
            f"site {site!r}: the scores of rank rule {name!r} fall as r grows, so that no order of steps is best; take e.g. "
            "their running maximum"
        )
    return scores.double()


def _check_names(spectra: Mapping[str, Tensor], **mappings: Mapping[str, object]) -> None:
    if not spectra:
        raise CordaError("no sites to share a budget out over; give at least one spectrum")
    for what, mapping in mappings.items():
        for site in sorted(mapping.keys() - spectra.keys()):
            raise UnknownNameError(f"site in {what}", site, spectra)
        if lacking := sorted(spectra.keys() - mapping.keys()):
            raise CordaError(f"site {lacking[0]!r} has a spectrum but no {what}; give both")
