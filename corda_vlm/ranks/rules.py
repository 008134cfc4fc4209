"""The rules that share a budget of ranks out, by name. A rule is one function in a file of its own, and a line here."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from corda_vlm.ranks.compactness_rule import by_compactness

RankRule = Callable[[Tensor, float, Tensor], Tensor]
"""(spectrum (R,) descending, log π, numbers r of components filtered so far (n,)) -> the score (n,) of filtering one more.

The site of the lowest score filters next, so that a site's scores must not fall as r grows."""

RANK_RULES: dict[str, RankRule] = {"compactness": by_compactness}
