"""Ranks where the next component of the new task's gradient gains most for what it moves of the knowledge."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from corda_vlm.ranks.view import SiteView


def by_gradient(site: SiteView, rank: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`-s²_{r+1} ‖W C'^½‖² / (out + inp)`, s the singular values of `G C'^-½`; a `RankRule`'s score.

    Among changes that move a layer's outputs on the knowledge by a share ε of what they are,
    `‖ΔW C'^½‖² = ε ‖W C'^½‖²`, one along component k lowers the new task's loss by `√ε s_k ‖W C'^½‖`, and gains of
    components and of layers add up in square. So this is the gain of the next rank for each of its parameters.
    """
    assert site.gradient is not None  # a need of the rule
    weight = 1.0 if site.output_energy is None else site.output_energy
    return -site.gradient[rank].square() * (weight / site.price)
