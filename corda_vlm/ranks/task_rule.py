"""Ranks where the new task's loss falls fastest along the directions that are offered."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from corda_vlm.ranks.view import SiteView


def by_task(site: SiteView, rank: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`-‖G Aᵀ‖² / ((out + inp) (r + 1))`; a `RankRule`'s score.

    The highest averages (D'Hondt): ranks in proportion to the task's energy for each parameter. Adam's steps are as long where
    the gradient is next to nothing as where it is large; so a rank there learns nothing, and forgets.
    """
    assert site.task_energy is not None  # a need of the rule
    return -(site.task_energy / site.price) / (rank.double() + 1)
