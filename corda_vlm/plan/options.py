"""What a plan may be asked for; read before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, get_args

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families.options import Quantization, SiteKeywords, SiteOptions
from corda_vlm.options import Count, NotNegative, Positive, Range, Seed, Text
from corda_vlm.plan.bases import PLAN_METHODS
from corda_vlm.ranks.rules import RANK_RULES, Need, get_rank_rule

Mode = Literal["kpm", "ipm"]
MODE: Mode = "kpm"
AUTO = "auto"
Route = Literal["auto", "exact", "fast"]
SideChoice = Literal["output", "input", "auto"]
Portion = Annotated[float, Range(at_least=0, at_most=1)]


@dataclass(frozen=True, kw_only=True)
class DecompositionOptions(SiteOptions):
    """Which components of which weight matrices become an adapter, and with what norm.

    Attributes:
        rank: Of every adapter; with `dynamic_rank` their budget: as many parameters as that rank everywhere.
        a_norm: The norm of each row of A at the start; B takes the inverse. It decides how far training strays from the
            planned directions (learning rates scale along). The default is the method's own: 10 for corda-natural, 1 for keep-lora, else the
            paper's split.
        damping: The δ of `C' = C + δ·mean(diag C)·I`, a share of the covariance's mean diagonal.
        side: Of "corda": the directions of each layer's output (the paper's), of its input, or auto, the input where a layer
            has more inputs than outputs. The default is the method's own.
        beta: Of "sc-lora": the weight of the knowledge against the task, from 0 to 1. The default is 0.5.
        dynamic_rank: Share the parameters out over the matrices, by `rank_rule`.
        rank_rule: With `dynamic_rank`, more rank where: task, the new task's gradient has most energy in the directions that are
            offered; gradient, it gains most for what it moves of the knowledge; energy, least of the knowledge's energy is at
            risk; compactness, CorDA++'s score is lowest. auto is what did best on validation data: gradient for methods that start from the
            new task's gradient, task for others if it is given, and without it compactness, which kept less than equal ranks.
        budget: With `dynamic_rank`: trainable parameters, `Σ (out + inp) · rank`, in place of as many as `rank` has.
        min_rank: With `dynamic_rank`: no matrix gets less; a number, or a mapping from names of matrices to numbers. Null is 1.
        max_rank: With `dynamic_rank`: no matrix gets more; a number, or a mapping from names of matrices to numbers.
        dynamic_covariance: Each matrix takes the best of its calibration rounds (CorDA++).
        route: How matrices are decomposed: exact, fast (the wanted components alone), or auto by their size.
        seed: Of what is random: LoRA's A, the fast route's starting block.
    """

    rank: Count = 16
    a_norm: Positive | None = None
    damping: NotNegative = 1e-4
    side: SideChoice | None = None
    beta: Portion | None = None
    dynamic_rank: bool = False
    rank_rule: Text = "auto"
    budget: Count | None = None
    min_rank: Count | Mapping[str, Count] | None = 1
    max_rank: Count | Mapping[str, Count] | None = None
    dynamic_covariance: bool = False
    route: Route = "auto"
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        least, most = self.min_rank, self.max_rank
        if isinstance(least, int) and isinstance(most, int) and most < least:
            raise CordaError(f"max_rank {most} is below min_rank {least}")
        if self.rank_rule != AUTO:
            get_rank_rule(self.rank_rule)
            if not self.dynamic_rank:
                raise CordaError(
                    f"rank_rule={self.rank_rule} given without dynamic_rank: every matrix then takes rank {self.rank}. Add "
                    "dynamic_rank=True (--dynamic-rank), or leave rank_rule out"
                )


class DecompositionKeywords(SiteKeywords, total=False):
    """`DecompositionOptions` as keywords of a function."""

    rank: int
    a_norm: float | None
    damping: float
    side: SideChoice | None
    beta: float | None
    dynamic_rank: bool
    rank_rule: str
    budget: int | None
    min_rank: int | Mapping[str, int] | None
    max_rank: int | Mapping[str, int] | None
    dynamic_covariance: bool
    route: Route
    seed: int


@dataclass(frozen=True, kw_only=True)
class PlanOptions(DecompositionOptions):
    """What `plan_adapter` and the verb `plan` may be asked for.

    Attributes:
        method: How the directions are found: corda, pissa, milora, olora, sc-lora or lora-null; corda-natural, lora-ga or
            keep-lora by the gradient of the new task's loss; qera or loftq by what quantising costs; auto: corda-natural where that gradient is given, else corda.
        quantize_to: Of "qera" and "loftq", whose pair is what quantising takes off the weights: what the base will be quantised to,
            nf4 or int8. The plan is made of the original weights, and attached to the quantised ones.
        mode: Of "corda": kpm adapts what the calibration data uses least, to keep it; ipm what it uses most, to learn it.
    """

    method: Text = AUTO
    mode: Mode = MODE
    quantize_to: Quantization | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != AUTO:
            check_plan(self.method, self)
        corrects = self.method != AUTO and PLAN_METHODS[self.method].corrects
        if corrects != (self.quantize_to is not None):
            takers = ", ".join(sorted(m for m, b in PLAN_METHODS.items() if b.corrects))
            raise CordaError(
                f"method {self.method!r} takes back what quantising costs: say to what, quantize_to='nf4' or 'int8'"
                if corrects
                else f"quantize_to is of {takers}, and method {self.method!r} does not look at it; leave it out"
            )

    def settled(self, has_gradient: bool) -> PlanOptions:
        """These options, with the method and the rank rule that "auto" means.

        Args:
            has_gradient: whether the gradient of the new task's loss is given.

        Raises:
            CordaError: an option that the method does not take.
        """
        settled = self
        if self.method == AUTO:
            self._check_mode(has_gradient)
            settled = replace(self, method="corda-natural" if has_gradient else "corda")
        rule = rule_of(settled.method, settled, has_gradient)
        return settled if rule is None else replace(settled, rank_rule=rule)

    def _check_mode(self, has_gradient: bool) -> None:
        if has_gradient and self.mode != MODE:
            raise CordaError(
                f"mode {self.mode!r} is of the method 'corda', which does not look at the gradient of the new task's loss; "
                "leave one of the two out"
            )


def check_plan(method: str, options: DecompositionOptions) -> None:
    """Raise a `CordaError` for an option that a method of planning does not take."""
    if method not in PLAN_METHODS:
        raise UnknownNameError("plan method", method, PLAN_METHODS)
    basis = PLAN_METHODS[method]
    if options.side is not None and not basis.free_side:
        raise CordaError(
            f"method {method!r} has its directions on the {basis.side} side and no choice; leave side= out, or take "
            f"one of {', '.join(sorted(m for m, b in PLAN_METHODS.items() if b.free_side))}"
        )
    if options.beta is not None and not basis.contrast:
        raise CordaError(
            f"beta weighs two covariances, and method {method!r} does not; leave it out, or take one of "
            f"{', '.join(sorted(m for m, b in PLAN_METHODS.items() if b.contrast))}"
        )
    if options.dynamic_covariance and not basis.has_rounds:
        raise CordaError(
            f"dynamic_covariance weighs covariances one by one, which method {method!r} does not use so; take method='corda' or "
            "leave it off"
        )
    rule_of(method, options)


def rule_of(method: str, options: DecompositionOptions, has_gradient: bool = True) -> str | None:
    """By which rule a plan shares ranks out, key of `RANK_RULES`; None where all are equal.

    Args:
        has_gradient: whether the gradient of the new task's loss is given, by which "auto" chooses.

    Raises:
        CordaError: the method has nothing that the rule looks at.
    """
    if not options.dynamic_rank:
        return None
    basis = PLAN_METHODS[method]
    if basis.of_gradient:
        usual, known = "gradient", {"gradient", "output_energy"}
    elif basis.has_rounds:
        usual = "task" if has_gradient else "compactness"
        known = {*get_args(Need)}
    else:
        raise CordaError(
            f"dynamic_rank weighs covariances one by one, or the gradient of the new task's loss, and method {method!r} uses "
            "neither so; take method='corda' or 'corda-natural', or leave it off"
        )
    name = usual if options.rank_rule == AUTO else options.rank_rule
    if not known.issuperset(get_rank_rule(name).needs):
        fit = sorted(n for n, rule in RANK_RULES.items() if known.issuperset(rule.needs))
        raise CordaError(
            f"rank rule {name!r} weighs components of the weight, and method {method!r} adapts those of the gradient; take "
            f"{', '.join(fit)}, leave rank_rule out, or take method='corda'"
        )
    return name


def takes_gradient(method: str, options: DecompositionOptions) -> bool:
    """Does such a plan look at the gradient of the new task's loss where it is given?"""
    rule = rule_of(method, options)
    return PLAN_METHODS[method].of_gradient or (rule is not None and get_rank_rule(rule).of_task)


def needs_gradient(method: str, options: DecompositionOptions) -> bool:
    """Can such a plan not be made without the gradient of the new task's loss?"""
    named = options.rank_rule != AUTO
    return PLAN_METHODS[method].of_gradient or (named and takes_gradient(method, options))


class PlanKeywords(DecompositionKeywords, total=False):
    """`PlanOptions` as keywords of a function."""

    method: str
    mode: Mode
    quantize_to: Quantization | None
