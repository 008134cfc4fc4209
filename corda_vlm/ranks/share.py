"""A budget of parameters shared out as ranks, in the order of a rule's scores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.ranks.budget import Bound, Shape, check_budget, uniform_budget
from corda_vlm.ranks.rules import RANK_RULES
from corda_vlm.ranks.spectra import checked

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
    """Site -> rank: a budget of parameters shared out so that `Σ (out + inp) · rank ≤ budget`.

    Every site filters its r = 1 smallest components; then, again and again, the site with the lowest
    score s(r) filters one more. KPM adapts what is filtered and stops before it would exceed the
    budget; IPM adapts what is left and stops once it is within.

    - The paper's KPM oversteps by one rank, and its IPM stops strictly below the budget. Here the
      budget is never exceeded, and may be met exactly in both modes.
    - A step that does not fit ends the allocation, as in the paper: cheaper sites further down would
      be served for their size, against the scores. So less than one rank of the largest site stays
      unspent, unless all sites are full, and a larger budget never takes a rank from a site.
    - Equal scores go by site name: the order of the mappings does not matter.
    - A rule's s(r) never falls as r grows, so the greedy order is the sorted order of all (site, r):
      one stable sort in place of a heap and a million steps.

    Args:
        spectra: site -> all R singular values of `W C'`, descending.
        compactness: site -> π of the covariance that the site takes.
        shapes: site -> (out, inp) of its weight. The three mappings name the same sites.
        rule: key of `RANK_RULES`.
        budget: parameters; or in its place `uniform_rank`, for as many as that rank has everywhere.
        min_rank, max_rank: floor and ceiling of the ranks, for all sites or by name, always within 1 to
            R − 1 (a higher ceiling is lowered to that).

    Raises:
        UnknownNameError: an unknown mode or rule, or a site that has no spectrum.
        CordaError: a budget outside what floors and ceilings allow, a floor above its ceiling, a
            spectrum that is incomplete, not descending or not finite, a compactness below 1.
    """
    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    if rule not in RANK_RULES:
        raise UnknownNameError("rank rule", rule, RANK_RULES)
    _check_names(spectra, compactness=compactness, shapes=shapes)
    if budget is None and uniform_rank is not None:
        budget = uniform_budget(shapes, uniform_rank)
    elif budget is None or uniform_rank is not None:
        raise CordaError("give either budget (in parameters) or uniform_rank, and not both")

    bounds = check_budget(shapes, budget, min_rank=min_rank, max_rank=max_rank)
    sites = sorted(spectra)
    price = torch.tensor([sum(shapes[site]) for site in sites])  # (n,) parameters of one rank
    lowest, highest = torch.tensor([bounds[site] for site in sites]).unbind(1)
    least, most = int(price @ lowest), int(price @ highest)

    scores = []  # per site, the scores of its steps in the order it would take them
    for site in sites:
        low, high = bounds[site]
        full = min(shapes[site])
        sigma, log_pi = checked(spectra[site], compactness[site], full, f"site {site!r}")
        filtered = (low if mode == "kpm" else full - high) + torch.arange(high - low)
        scores.append(RANK_RULES[rule](sigma, log_pi, filtered))

    order = torch.cat(scores).argsort(stable=True)
    owner = torch.arange(len(sites)).repeat_interleave(highest - lowest)[order]
    after = price[owner].cumsum(0)  # parameters moved by the steps up to and with this one
    fits = least + after <= budget if mode == "kpm" else most - after + price[owner] > budget
    steps = owner[: int(fits.sum())].bincount(minlength=len(sites))
    ranks = lowest + steps if mode == "kpm" else highest - steps
    shared = dict(zip(sites, ranks.tolist(), strict=True))
    return {site: shared[site] for site in spectra}


def _check_names(spectra: Mapping[str, Tensor], **mappings: Mapping[str, object]) -> None:
    if not spectra:
        raise CordaError("no sites to share a budget out over; give at least one spectrum")
    for what, mapping in mappings.items():
        for site in sorted(mapping.keys() - spectra.keys()):
            raise UnknownNameError(f"site in {what}", site, spectra)
        if lacking := sorted(spectra.keys() - mapping.keys()):
            raise CordaError(f"site {lacking[0]!r} has a spectrum but no {what}; give both")
