"""The share of what a model knew before training that it has kept: one rule for every report and card."""

from __future__ import annotations

from corda_vlm.evaluation.scores import NO_SHARE


def kept_share(
    metric: str, value: float, base: float, low: float | None, chance: float
) -> float | None:
    """(value − chance) / (base − chance): 1 is the model before training, 0 is guessing.

    Args:
        value: the score after training.
        base: that before.
        low: the lower end of the interval of `base`; None where it is not known, and then `base` itself counts.
        chance: what guessing gives.

    Returns:
        None where there is nothing to be kept: the metric has no such zero (a perplexity), or the model before training is not
        above chance, also at the lower end of its interval. Otherwise a hair above chance would be divided by.
    """
    surely = base if low is None else min(base, low)
    if metric in NO_SHARE or surely <= chance:
        return None
    return (value - chance) / (base - chance)
