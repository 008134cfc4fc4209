"""The plan as a value; see `table` for readers and `file` for the disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import nn

from corda_vlm.decompose import Decomposition
from corda_vlm.errors import ForeignFileError
from corda_vlm.families import any_family
from corda_vlm.families.options import Quantization
from corda_vlm.locks import locks
from corda_vlm.options import (
    Count,
    CountOrZero,
    Items,
    NotNegative,
    Positive,
    Text,
)
from corda_vlm.plan.bases import PLAN_METHODS, Components, Side
from corda_vlm.plan.file import read_plan, write_plan
from corda_vlm.plan.table import table_of
from corda_vlm.same_model import is_made_from
from corda_vlm.sites import Site, model_fingerprint


@dataclass(frozen=True)
class SitePlan:
    """How one weight matrix is adapted. Its numbers are kept to six digits, for readers and for diffs.

    Attributes:
        shape: (out, inp) of the weight.
        rank: of the adapter.
        round: which calibration round's covariance; None: all rounds pooled, or no data.
        components: "smallest" or "largest".
        side, power: of the basis, see `PlanMethod`.
        spectrum: the `rank` singular values of `W C'^p` that were chosen, descending; on the input side the eigenvalues
            of `C'^p`, for "sc-lora" those of its difference, which may be negative.
        predicted_damage: the share of knowledge energy put at risk, `‖B A C'‖² / ‖W C'‖²` (Frobenius), 0 to 1;
            None without data.
        floored: how many of the chosen components lie at the precision's floor and were completed.
        chosen_energy, total_energy: `‖B A C'^p‖` and `‖W C'^p‖` (Frobenius).
        route: "exact" or "fast"; "fast" knows the chosen values only, not the rest of the spectrum.
        compactness: `π(C') = √(out · σ_max) / σ_min` of the damped covariance at mean diagonal 1. None without data,
            and unless a dynamic option or route="exact" was asked for: it takes all eigenvalues of C', which cost a good
            part of the fast route's whole decomposition.
        scores: of each calibration round, under `dynamic_covariance`; `round` is the one of the lowest.
        gradient_share: of a method that starts from the new task's gradient: the share of its energy, in the method's
            metric, that lies in the adapted directions, 0 to 1; else None, and in plans of former versions.
        tokens: of an expert, how many of the knowledge its router sent it; else None.
        pooled: that was too few, so that the covariance is that of its layer's experts together.
    """

    site: Site
    shape: tuple[Count, Count]
    rank: Count
    round: CountOrZero | None
    components: Components
    side: Side
    power: float
    spectrum: tuple[float, ...]
    predicted_damage: NotNegative | None
    floored: CountOrZero
    chosen_energy: NotNegative
    total_energy: NotNegative
    route: Literal["exact", "fast"]
    compactness: Positive | None
    scores: Annotated[tuple[float, ...], Items(least=1)] | None
    gradient_share: NotNegative | None = None
    tokens: CountOrZero | None = None
    pooled: bool = False

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            object.__setattr__(self, entry.name, _six_digits(getattr(self, entry.name)))


@dataclass(frozen=True)
class AdapterPlan:
    """Everything `attach_adapter` needs; `str(plan)` is a table.

    Attributes:
        method: key of `PLAN_METHODS`.
        mode: "kpm" or "ipm"; None for a method that has no modes.
        rank: as asked for; under `dynamic_rank` sites differ.
        budget: parameters that `dynamic_rank` was allowed; None without it. A `budget=` replaces `rank`.
        rank_rule: key of `RANK_RULES`, by which they were shared out; None without it, and in plans of versions that had
            compactness alone.
        damping: δ of `C' = C + δ·mean(diag C)·I`.
        a_norm: norm of each row of A at the start; None: the paper's split `B = U Σ^½`.
        beta: of "sc-lora", see `plan_adapter`; None for the others.
        model_fingerprint, data_fingerprint: what it was made from; no data: None.
        quantize_to: of a method that corrects what quantising takes away: what the model is quantised to that it is attached to;
            else None.
        model_signs: of the same model, see `same_model`; None in plans of former versions.
        task_fingerprint: of the data of the new task, for a method that takes both; else None.
        family: key of `FAMILIES`.
        sites: in the model's order.
        factors: site name -> decomposition, float32 on the CPU.
    """

    method: Text
    mode: str | None
    rank: Count
    budget: Count | None
    damping: NotNegative
    a_norm: Positive | None
    beta: float | None
    model_fingerprint: str
    data_fingerprint: str | None
    task_fingerprint: str | None
    family: str
    rank_rule: str | None = field(default=None, kw_only=True)
    model_signs: str | None = field(default=None, kw_only=True)
    quantize_to: Quantization | None = field(default=None, kw_only=True)
    sites: Annotated[tuple[SitePlan, ...], Items(least=1)]
    factors: Mapping[str, Decomposition] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return self.table()

    @property
    def parameters(self) -> int:
        """Trainable parameters: `Σ (out + inp) · rank`."""
        return sum(sum(s.shape) * s.rank for s in self.sites)

    @property
    def corrects(self) -> bool:
        """Is its pair added to a quantised base, rather than taken out of what is trained?"""
        basis = PLAN_METHODS.get(self.method)
        return basis is not None and basis.corrects

    @property
    def starts_at_zero(self) -> bool:
        """Does every B start at zero, as in a plain LoRA? The model's own weights then need no correction."""
        return all(not factor.B.any() for factor in self.factors.values())

    def table(self) -> str:
        """A readable table, one row a site; columns that would say nothing are left out."""
        return table_of(self)

    @property
    def spent(self) -> str:
        """The budget in words, e.g. `589,824 of 589,824 parameters, ranks 1 to 40`."""
        of = "" if self.budget is None else f" of {self.budget:,}"
        low, high = min(s.rank for s in self.sites), max(s.rank for s in self.sites)
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        if self.rank_rule is not None:
            ranks += f" by {self.rank_rule}"
        return f"{self.parameters:,}{of} parameters, {ranks}"

    def check(
        self,
        model: nn.Module | None = None,
        *,
        mode: str | None = None,
        method: str | None = None,
        origin: str = "this plan",
    ) -> None:
        """Refuse to be used for another model, mode or method.

        Raises:
            ForeignFileError: it was made for another; the message names both.
        """
        if mode is not None and mode != self.mode:
            raise ForeignFileError(
                f"{origin} was made in mode {self.mode!r}, not {mode!r}: the modes adapt opposite components. "
                f"Make a plan with mode={mode!r}."
            )
        if method is not None and method != self.method:
            raise ForeignFileError(
                f"{origin} was made by method {self.method!r}, not {method!r}. Make a plan with method={method!r}."
            )
        if model is None:
            return
        family = any_family(model).name
        if family != self.family:
            raise ForeignFileError(
                f"{origin} was made for a model of family {self.family!r}, and this one is {family!r} "
                f"({type(model).__name__}). Make a plan for this model."
            )
        if not is_made_from(model, self.model_fingerprint, self.model_signs, origin):
            fingerprint = model_fingerprint(model)
            raise ForeignFileError(
                f"{origin} was made for the {self.family!r} model {self.model_fingerprint}, and this one is "
                f"{fingerprint}: other layers or other weights. Load the model it was made for, or make a plan "
                "for this one."
            )

    @locks("path")
    def save(self, path: str | Path) -> Path:
        """Write `path` (JSON) and the factors beside it (`.safetensors`), each atomically; return `path`."""
        return write_plan(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: nn.Module | None = None,
        mode: str | None = None,
        method: str | None = None,
        factors: bool = True,
    ) -> AdapterPlan:
        """Read what `save` wrote; with `model`, `mode` or `method`, `check` against them too.

        `factors=False` reads the JSON alone: enough to look at, not to attach.

        Raises:
            ForeignFileError: missing, corrupt, truncated, factors that are not this plan's, or another model, mode
                or method.
        """
        plan = read_plan(cls, path, factors=factors)
        plan.check(model, mode=mode, method=method, origin=f"the plan {path}")
        return plan


def _six_digits(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_six_digits, value))
    return float(f"{value:.6g}") if isinstance(value, float) else value
