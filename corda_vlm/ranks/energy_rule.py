"""Equal marginal knowledge energy for each parameter: a site adapts its next component where that risks least."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from corda_vlm.ranks.view import SiteView


def by_energy(site: SiteView, filtered: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`σ² / (Σ_k σ_k² · (out + inp))` of the next smallest component; a `RankRule`'s score.

    σ² is the energy `‖B A C'‖²` that adapting the component puts at risk. It is counted as a share of the layer's own:
    layers differ in scale by more than in shape.
    """
    assert site.spectrum is not None  # a need of the rule
    energy = site.spectrum.square()
    total = energy.sum()
    # a layer that ignores its inputs has nothing at risk
    share = energy / total if total > 0 else energy
    return share[len(share) - 1 - filtered] / site.price
