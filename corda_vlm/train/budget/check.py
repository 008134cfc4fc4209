"""What can be told to be wrong with a budget before a model is prepared."""

from __future__ import annotations

from corda_vlm.families import Family
from corda_vlm.train.budget.kept import check_count
from corda_vlm.train.budget.options import BudgetOptions
from corda_vlm.train.budget.probe import check_metric


def check_budget(options: BudgetOptions, family: Family, count: int) -> None:
    """Raise `CordaError` for a metric that is not for models of a family, or fewer records than would tell of a model that
    knows all of them.

    Args:
        count: how many records the probe has.
    """
    keep = options.keep
    assert keep is not None
    check_metric(options.keep_metric, family)
    check_count(count, keep, "the probe's")
