"""The rules that share a budget of ranks out, by name; read before PyTorch is imported.

A rule is one function in a file of its own, and a line here, or a call of `register_rank_rule`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from corda_vlm.errors import UnknownNameError
from corda_vlm.lazy import later
from corda_vlm.registries import register

if TYPE_CHECKING:
    from torch import Tensor

    from corda_vlm.ranks.view import SiteView

Need = Literal["spectrum", "log_compactness", "gradient", "output_energy", "task_energy"]
OF_TASK = ("gradient", "task_energy")


@dataclass(frozen=True)
class RankRule:
    """How a budget of parameters is shared out over sites.

    Attributes:
        score: (what it sees of a site, numbers r (n,)) -> scores (n,) in float64, of one more step after r of them. The
            site of the lowest score takes the next step, so that a site's scores must not fall as r grows.
        needs: what it looks at, names of `SiteView`'s attributes.
        grows: what a step is. False: the site filters one more of its smallest components, which mode "kpm" adapts, and
            of which mode "ipm" adapts the rest, so that r counts components that are filtered. True: the adapter gets one
            more rank, whatever the mode, and r is its rank so far.
    """

    score: Callable[[SiteView, Tensor], Tensor]
    needs: tuple[Need, ...]
    grows: bool = False

    @property
    def of_task(self) -> bool:
        """Does it look at the gradient of the new task's loss?"""
        return any(need in OF_TASK for need in self.needs)


RANK_RULES: dict[str, RankRule] = {
    "compactness": RankRule(
        later("corda_vlm.ranks.compactness_rule", "by_compactness"), ("spectrum", "log_compactness")
    ),
    "energy": RankRule(later("corda_vlm.ranks.energy_rule", "by_energy"), ("spectrum",)),
    "task": RankRule(later("corda_vlm.ranks.task_rule", "by_task"), ("task_energy",), grows=True),
    "gradient": RankRule(
        later("corda_vlm.ranks.gradient_rule", "by_gradient"),
        ("gradient", "output_energy"),
        grows=True,
    ),
}


def get_rank_rule(name: str) -> RankRule:
    """`RANK_RULES[name]`, or `UnknownNameError` with the choices."""
    if name not in RANK_RULES:
        raise UnknownNameError("rank rule", name, RANK_RULES)
    return RANK_RULES[name]


def register_rank_rule(name: str, rule: RankRule) -> RankRule:
    """Make a rule of your own known by its name, to `rank_rule` in Python, YAML and on the command line. Returns it.

    Raises:
        CordaError: another rule has that name.
    """
    return register(RANK_RULES, "rank rule", name, rule)
