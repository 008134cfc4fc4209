"""A forgetting budget: how much of what a model knew is to be kept, in place of weights of terms and learning rates.

budget = forgetting_budget(model, probe, 0.95, processor=processor)    # before the first step
train(model, data, processor, options=..., terms=[...], budget=budget, output_dir=...)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.train.budget.budget import Budget, forgetting_budget
    from corda_vlm.train.budget.kept import Kept
    from corda_vlm.train.budget.options import BudgetOptions
    from corda_vlm.train.budget.spent import Spent

_HOMES = {
    "Budget": "budget",
    "BudgetOptions": "options",
    "Kept": "kept",
    "Spent": "spent",
    "forgetting_budget": "budget",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
