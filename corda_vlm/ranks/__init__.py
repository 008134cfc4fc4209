"""Rank allocation: which covariance a site takes, and how many ranks it is given. Pure functions over spectra.

Names are imported on first use: a rule that is misspelled is an error before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.ranks.budget import Bound, Shape, check_budget, uniform_budget
    from corda_vlm.ranks.compactness_rule import compactness
    from corda_vlm.ranks.rules import RANK_RULES, RankRule, get_rank_rule, register_rank_rule
    from corda_vlm.ranks.selection import Selection, select_covariance, selection_score
    from corda_vlm.ranks.share import MODES, allocate_ranks, share_out
    from corda_vlm.ranks.spectra import spectrum
    from corda_vlm.ranks.view import SiteView

_HOMES = {
    "MODES": "share",
    "RANK_RULES": "rules",
    "Bound": "budget",
    "RankRule": "rules",
    "Selection": "selection",
    "Shape": "budget",
    "SiteView": "view",
    "allocate_ranks": "share",
    "check_budget": "budget",
    "compactness": "compactness_rule",
    "get_rank_rule": "rules",
    "register_rank_rule": "rules",
    "select_covariance": "selection",
    "selection_score": "selection",
    "share_out": "share",
    "spectrum": "spectra",
    "uniform_budget": "budget",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
