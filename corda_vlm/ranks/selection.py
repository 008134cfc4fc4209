"""Which calibration covariance a site takes (CorDA++, arXiv 2506.13187, read second hand, from a transcription)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from corda_vlm.errors import CordaError
from corda_vlm.ranks.compactness_rule import compactness
from corda_vlm.ranks.spectra import checked, spectrum


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
    sigma, log_pi = checked(spectrum, compactness, max(len(spectrum), 1), "a site")
    count = len(sigma) if rank is None else rank
    if not 1 <= count <= len(sigma):
        raise CordaError(f"rank {rank} is outside 1 to {len(sigma)}; choose one within")
    # A layer that ignores its inputs loses nothing, whichever covariance it takes.
    return log_pi * float(sigma[-count:].sum() / sigma[0]) if sigma[0] > 0 else 0.0


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
    damping: float,
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
