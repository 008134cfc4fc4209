"""CorDA++: which calibration covariance a site takes, and how many ranks it is given.

The formulas of CorDA++ (arXiv 2506.13187), read second hand, from a transcription of the paper.
`σ_1 ≥ … ≥ σ_R` are the singular values of `W C'`, `R = min(out, inp)`, and `σ₋ᵣ` is the r-th smallest.
`C'` is the damped covariance at mean diagonal 1: π scales as `c^-½` under `C → cC`, and a negative
logarithm of it would turn every comparison below round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.errors import CordaError, UnknownNameError

MODES = ("ipm", "kpm")
Shape = tuple[int, int]
Bound = int | Mapping[str, int]


def compactness(
    covariance: Float[Tensor, "d d"], out_features: int, *, damping: float = 1e-4
) -> float:
    """`π(C') = √(out · σ_max(C')) / σ_min(C')`, at least `√out`; the lower, the more compact.

    Dropping the r-th smallest component changes the layer's outputs by at most `π · σ₋ᵣ`.

    Args:
        covariance: symmetric second moment of the layer's inputs, of any scale.
        out_features: rows of the layer's weight.
        damping: δ in units of the mean diagonal, 0 for plain `C`. It is always applied: across a
            threshold candidates would not compare, and a well-conditioned `C` hardly feels it.

    Raises:
        CordaError: NaN or Inf, zero, not positive semi-definite, or singular at `damping=0`.
    """
    eigenvalues = torch.linalg.eigvalsh(_normalized(covariance))  # (d,) ascending
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    # Damped here, not before: rounding below zero must not eat the damping up.
    low, high = ((max(value, 0.0) + damping) / (1 + damping) for value in (smallest, largest))
    if low <= 1e-15 * high or smallest < -1e-3 * largest:
        raise CordaError(
            f"a covariance has eigenvalues from {smallest:.3g} to {largest:.3g} (mean diagonal 1) and "
            f"damping {damping:g}: singular, or no second moment `X Xᵀ / count` at all; give a positive "
            "damping, e.g. 1e-4, or calibrate with more tokens"
        )
    return math.sqrt(out_features * high) / low


def selection_score(
    spectrum: Float[Tensor, " R"], compactness: float, *, rank: int | None = None
) -> float:
    """`s(C) = log π(C) · Σ_r σ₋ᵣ / σ_max`, the lower the better.

    Args:
        spectrum: all singular values of `W C'`, descending.
        compactness: `π` of the same covariance.
        rank: None sums the whole spectrum, as the paper does; a number only so many of the smallest
            values, which are what a KPM adapter of that rank puts at risk.
    """
    sigma, log_pi = _checked(spectrum, compactness, max(len(spectrum), 1), "a site")
    count = len(sigma) if rank is None else rank
    if not 1 <= count <= len(sigma):
        raise CordaError(f"rank {rank} is outside 1 to {len(sigma)}; choose one within")
    # A layer that ignores its inputs loses nothing, whichever covariance it takes.
    return log_pi * float(sigma[-count:].sum() / sigma[0]) if sigma[0] > 0 else 0.0


def spectrum(
    weight: Float[Tensor, "out inp"], covariance: Float[Tensor, "inp inp"], *, damping: float = 1e-4
) -> Float[Tensor, " R"]:
    """All `R = min(out, inp)` singular values of `W C'`, descending, float64 on the CPU.

    Of `W C'` itself and not from the eigenvalues of its square: CorDA++ starts from the smallest values, and
    below the root of float64's precision (1e-8 of the largest) the square holds nothing but rounding.
    """
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    oriented = weight.detach().to(device, torch.float64) @ _normalized(
        covariance.to(device), damping
    )
    return torch.linalg.svdvals(oriented).cpu()


@dataclass(frozen=True)
class Selection:
    """The candidate that a site takes.

    Attributes:
        index: of the candidate with the lowest score, the first of equals.
        scores: `selection_score` of every candidate.
        compactness: π of the one taken, for this site's weight.
        spectrum: (R,) of `W C'` with the one taken.
    """

    index: int
    scores: tuple[float, ...]
    compactness: float
    spectrum: Float[Tensor, " R"]


def select_covariance(
    candidates: Iterable[Float[Tensor, "inp inp"]],
    weights: Mapping[str, Float[Tensor, "_out inp"]],
    *,
    rank: int | None = None,
    damping: float = 1e-4,
) -> dict[str, Selection]:
    """Which candidate each of the sites that read one stream takes: the one of its lowest score.

    A candidate's eigenvalues are computed once for all of the stream's sites: 0.04 s at width 768, 1 s at 3,072, growing
    with its cube (one thread); and for each site a spectrum: 0.1 s at 768×768, 1 s at 768×3072.

    Args:
        candidates: taken one after the other and not kept, so that a generator holds one of them in memory.
        weights: site -> its weight.
        rank: see `selection_score`.

    Raises:
        CordaError: no candidates, or one that is no covariance; the message says which.
    """
    scores: dict[str, list[float]] = {site: [] for site in weights}
    taken: dict[str, tuple[int, float, Tensor]] = {}
    for index, candidate in enumerate(candidates):
        try:
            # π grows with the root of out, and that is all it has of the weight
            alone = compactness(candidate, 1, damping=damping)
            for site, weight in weights.items():
                pi = alone * math.sqrt(len(weight))
                sigma = spectrum(weight, candidate, damping=damping)
                score = selection_score(sigma, pi, rank=rank)
                if all(score < former for former in scores[site]):
                    taken[site] = (index, pi, sigma)
                scores[site].append(score)
        except CordaError as error:
            raise CordaError(f"candidate {index} (from 0): {error}") from error
    if weights and not taken:
        raise CordaError("no covariance to select from; calibrate with at least one round")
    return {
        site: Selection(index, tuple(scores[site]), pi, sigma)
        for site, (index, pi, sigma) in taken.items()
    }


def uniform_budget(shapes: Mapping[str, Shape], rank: int) -> int:
    """Parameters of adapters of the same `rank` at every site: `Σ (out + inp) · rank`.

    The rank has to lie within 1 to `min(out, inp)` at every site.
    """
    for site, shape in shapes.items():
        if not 1 <= rank <= min(shape):
            raise CordaError(
                f"site {site!r}: rank {rank} is outside 1 to {min(shape)}, the full rank of its weight "
                f"{tuple(shape)}; choose a rank within, or leave the site out"
            )
    return rank * sum(map(sum, shapes.values()))


def check_budget(
    shapes: Mapping[str, Shape],
    budget: int,
    *,
    min_rank: Bound | None = 1,
    max_rank: Bound | None = None,
) -> dict[str, tuple[int, int]]:
    """Site -> its lowest and highest rank, once it is clear that `budget` parameters can be shared out within.

    Needs no covariance, so that a request that cannot be is refused before hours of work.

    Raises:
        UnknownNameError: a floor or ceiling for a site that is not there.
        CordaError: a floor above its ceiling, or a budget below the floors or above the ceilings.
    """
    for what, bound in (("min_rank", min_rank), ("max_rank", max_rank)):
        for site in sorted(bound.keys() - shapes.keys()) if isinstance(bound, Mapping) else ():
            raise UnknownNameError(f"site in {what}", site, shapes)
    bounds = {site: _bounds(site, shape, min_rank, max_rank) for site, shape in shapes.items()}
    least, most = (sum(sum(shapes[s]) * bounds[s][end] for s in shapes) for end in (0, 1))
    sites = f"{len(shapes)} site{'s' * (len(shapes) != 1)}"
    if budget < least:
        floors = max(low for low, _ in bounds.values())
        what = "one rank a site" if floors == 1 else f"their floors (min_rank, up to {floors})"
        raise CordaError(
            f"a budget of {budget:,} parameters is too small for {sites}: {what} takes {least:,}. Give at least "
            "that, lower the floors, or adapt fewer sites (towers=, roles=)"
        )
    if budget > most:
        full = all(high == min(shapes[s]) - 1 for s, (_, high) in bounds.items())
        what = "full rank less 1 everywhere" if full else "their ceilings (max_rank)"
        raise CordaError(
            f"a budget of {budget:,} parameters is too large for {sites}: {what} takes {most:,}. Give at most that"
            + ("" if full else ", or raise the ceilings")
        )
    return bounds


def allocate_ranks(
    spectra: Mapping[str, Float[Tensor, " _R"]],
    compactness: Mapping[str, float],
    shapes: Mapping[str, Shape],
    *,
    mode: str = "kpm",
    budget: int | None = None,
    uniform_rank: int | None = None,
    min_rank: Bound | None = 1,
    max_rank: Bound | None = None,
) -> dict[str, int]:
    """Site -> rank: a budget of parameters shared out so that `Σ (out + inp) · rank ≤ budget`.

    Every site filters its r = 1 smallest components; then, again and again, the site with the lowest
    `s(r) = log π · σ₋ᵣ / Σ_{k=1..R−r} σ_k` filters one more. KPM adapts what is filtered and stops
    before it would exceed the budget; IPM adapts what is left and stops once it is within.

    - The paper's KPM oversteps by one rank, and its IPM stops strictly below the budget. Here the
      budget is never exceeded, and may be met exactly in both modes.
    - A step that does not fit ends the allocation, as in the paper: cheaper sites further down would
      be served for their size, against the scores. So less than one rank of the largest site stays
      unspent, unless all sites are full, and a larger budget never takes a rank from a site.
    - Equal scores go by site name: the order of the mappings does not matter.
    - σ₋ᵣ grows with r and the sum shrinks, so s(r) never falls, and the greedy order is the sorted
      order of all (site, r): one stable sort in place of a heap and a million steps.

    Args:
        spectra: site -> all R singular values of `W C'`, descending.
        compactness: site -> π of the covariance that the site takes.
        shapes: site -> (out, inp) of its weight. The three mappings name the same sites.
        budget: parameters; or in its place `uniform_rank`, for as many as that rank has everywhere.
        min_rank, max_rank: floor and ceiling of the ranks, for all sites or by name, always within 1 to
            R − 1 (a higher ceiling is lowered to that).

    Raises:
        UnknownNameError: an unknown mode, or a site that has no spectrum.
        CordaError: a budget outside what floors and ceilings allow, a floor above its ceiling, a
            spectrum that is not whole, descending and finite, a compactness below 1.
    """
    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
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
        sigma, log_pi = _checked(spectra[site], compactness[site], full, f"site {site!r}")
        filtered = (low if mode == "kpm" else full - high) + torch.arange(high - low)
        kept = sigma.cumsum(0)[full - filtered - 1]
        # Where nothing is left to keep σ₋ᵣ is 0 too: such a component costs nothing.
        scores.append(log_pi * torch.where(kept > 0, sigma[full - filtered] / kept, 0.0))

    order = torch.cat(scores).argsort(stable=True)
    owner = torch.arange(len(sites)).repeat_interleave(highest - lowest)[order]
    after = price[owner].cumsum(0)  # parameters moved by the steps up to and with this one
    fits = least + after <= budget if mode == "kpm" else most - after + price[owner] > budget
    steps = owner[: int(fits.sum())].bincount(minlength=len(sites))
    ranks = lowest + steps if mode == "kpm" else highest - steps
    shared = dict(zip(sites, ranks.tolist(), strict=True))
    return {site: shared[site] for site in spectra}


def _normalized(covariance: Float[Tensor, "d d"], damping: float = 0.0) -> Float[Tensor, "d d"]:
    """`C'` in float64 at mean diagonal 1."""
    matrix = covariance.detach().double()
    mean = float(matrix.diagonal().mean())
    if not (mean > 0 and bool(matrix.isfinite().all())):
        raise CordaError(f"covariance zero, NaN or Inf (mean diagonal {mean:g}); calibrate again")
    matrix = matrix / mean
    matrix.diagonal().add_(damping)
    return matrix / (1 + damping)


def _checked(spectrum: Tensor, compactness: float, full: int, what: str) -> tuple[Tensor, float]:
    """The spectrum in float64 on the CPU, (R,), where cumulative sums never fall, and log π."""
    sigma = spectrum.detach().to("cpu", torch.float64)
    if len(sigma) != full:
        raise CordaError(
            f"{what}: {len(sigma)} singular values, but the full rank is {full}; the whole spectrum is "
            'needed, which the exact route gives: route="exact"'
        )
    bad = (sigma < 0) | ~sigma.isfinite()
    bad[1:] |= sigma[1:] > sigma[:-1]
    if bad.any():
        at = int(bad.nonzero()[0])
        raise CordaError(
            f"{what}: singular value {at + 1} of {len(sigma)} is {sigma[at]:.6g}, after "
            f"{sigma[max(at - 1, 0)]:.6g}; they have to be finite, not negative, and descending"
        )
    if not 1 <= compactness < math.inf:
        raise CordaError(
            f"{what}: its compactness {compactness:g} is not a finite number of 1 or more; take it from "
            "`corda_vlm.ranks.compactness`, which normalizes and damps the covariance"
        )
    return sigma, math.log(compactness)


def _check_names(spectra: Mapping[str, Tensor], **mappings: Mapping[str, object]) -> None:
    if not spectra:
        raise CordaError("no sites to share a budget out over; give at least one spectrum")
    for what, mapping in mappings.items():
        for site in sorted(mapping.keys() - spectra.keys()):
            raise UnknownNameError(f"site in {what}", site, spectra)
        if lacking := sorted(spectra.keys() - mapping.keys()):
            raise CordaError(f"site {lacking[0]!r} has a spectrum but no {what}; give both")


def _bounds(
    site: str, shape: Shape, min_rank: Bound | None, max_rank: Bound | None
) -> tuple[int, int]:
    """The lowest and the highest rank that the site may be given."""
    top = min(shape) - 1
    low = min_rank.get(site, 1) if isinstance(min_rank, Mapping) else min_rank
    low = 1 if low is None else low
    high = max_rank.get(site, top) if isinstance(max_rank, Mapping) else max_rank
    high = top if high is None else min(high, top)
    if not 1 <= low <= high:
        raise CordaError(
            f"site {site!r}: no rank lies between its floor {low} (min_rank) and its ceiling {high} (max_rank; at "
            f"most {top}, full rank less 1); change them, or leave the site out"
        )
    return low, high
