"""How much of what a model knew a training is to keep, and how that is told; read before PyTorch is imported."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from corda_vlm.errors import CordaError
from corda_vlm.options import Count

KeepBy = Literal["auto", "distill", "anchor", "strength", "stop"]
KeepMetric = Literal["auto", "top1", "top5", "agreement", "answers"]

KEEP, WEIGHT = "keep", "keep_weight"
"""Keys of logs and of the history."""

EVERY = 10
RECORDS = 512


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """How much of what the model knew is to be kept, in place of weights.

    Attributes:
        keep: The share of what the model knew that is to be kept, chance subtracted, e.g. 0.95: 1 is the model before
            training, 0 is guessing. It is told by records of the knowledge that nothing trains on, the probe. The weight of a term is
            steered so that the probe stays above it, and in the end the largest strength of what was trained is taken that
            meets it. The share of other records of the knowledge scatters around it by the interval that is told with it: at half of
            all trainings it is lower. None: no budget.
        keep_by: Which term's weight is steered: "distill", "anchor"; "auto": that which has a weight, which is then where
            it starts, else distill where there are records of the knowledge, else the anchor where there are covariances;
            "strength": none, only the strength in the end is chosen; "stop": none, and the training ends early where the mean of the
            last look at each part is below the budget.
        keep_every: Steps between two looks at a part of the probe.
        keep_metric: "top1" or "top5": accuracy among the prompts of the probe's class names; "answers": the share of
            answers whose every token is the most likely one; "agreement": with what the model said before training, without labels;
            "auto": for models that generate text answers where it knows a quarter of them, for others top5 for records with
            labels of more than 100 classes and top1 of fewer, else agreement.
        probe: The records that tell, a data spec. None: such of the knowledge's as no other part of the training looks at.
        probe_records: At most so many of them, drawn at random.
        probe_templates: The prompts of the probe's class names, {} is the class; or one name alone without it, of a list in
            eval/templates.
    """

    keep: float | None = None
    keep_by: KeepBy = "auto"
    keep_every: Count = EVERY
    keep_metric: KeepMetric = "auto"
    probe: str | dict[str, Any] | None = None
    probe_records: Count = RECORDS
    probe_templates: tuple[str, ...] = ("{}",)

    def check_budget(self) -> None:
        """Raise `CordaError` for a budget that is none, or for what is said of one that is not there."""
        if self.keep is not None:
            check_keep(self.keep)
            return
        for field in fields(BudgetOptions):
            value = getattr(self, field.name)
            if (tuple(value) if isinstance(value, list) else value) != field.default:
                raise CordaError(
                    f"{field.name}= is for keep=, the share of what the model knew that is to be kept; give that too, or leave "
                    f"{field.name} out"
                )


def check_keep(keep: float) -> float:
    """`keep` itself.

    Raises:
        CordaError: it is no share above chance, and at most all.
    """
    if not 0 < keep <= 1:
        percent = f"; {keep:g} per cent is {keep / 100:g}" if 1 < keep <= 100 else ""
        raise CordaError(
            f"keep is {keep:g}; it is the share of what the model knew that is to be kept, above 0 (chance) and at most 1 "
            f"(all of it){percent}"
        )
    return keep
