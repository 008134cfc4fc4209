"""Rank allocation: which covariance a site takes, and how many ranks it is given. Pure functions over spectra."""

from __future__ import annotations

from corda_vlm.ranks.budget import Bound, Shape, check_budget, uniform_budget
from corda_vlm.ranks.compactness_rule import compactness
from corda_vlm.ranks.rules import RANK_RULES, RankRule
from corda_vlm.ranks.selection import Selection, select_covariance, selection_score
from corda_vlm.ranks.share import MODES, allocate_ranks
from corda_vlm.ranks.spectra import spectrum

__all__ = [
    "MODES",
    "RANK_RULES",
    "Bound",
    "RankRule",
    "Selection",
    "Shape",
    "allocate_ranks",
    "check_budget",
    "compactness",
    "select_covariance",
    "selection_score",
    "spectrum",
    "uniform_budget",
]
