"""What a method is, and what it can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from corda_vlm.errors import CordaError
from corda_vlm.options import Count, Items, NotNegative, Positive, Range, Seed, Text, check_options

if TYPE_CHECKING:
    from torch import nn

    from corda_vlm.covariance import CovarianceStore
    from corda_vlm.plan import AdapterPlan

Side = Literal["output", "input", "auto"]
Portion = Annotated[float, Range(at_least=0, at_most=1)]
Names = Annotated[Sequence[Text], Items(distinct=True)]


@dataclass(frozen=True)
class MethodOptions:
    """What a method may be asked for; each takes what it knows.

    Attributes:
        rank: of the adapters; alpha is the same, so scaling is 1.
        towers, roles: which sites, as in `find_sites`; None: all.
        a_norm: norm of each row of A at the start, see `plan_adapter`; None: the method's own.
        dynamic_rank, dynamic_covariance, budget, min_rank, max_rank, side, beta: as in `plan_adapter`.
        rho: of eva, see `attach_eva`.
        damping, route, base, freeze_a, modules_to_save: as in `plan_adapter` and `attach_adapter`.
        seed: of what is random (LoRA's A, the fast route's starting block).
    """

    rank: Count = 16
    towers: Names | str | None = None
    roles: Names | str | None = None
    a_norm: Positive | None = None
    dynamic_rank: bool = False
    dynamic_covariance: bool = False
    budget: Count | None = None
    min_rank: Count | Mapping[str, Count] = 1
    max_rank: Count | Mapping[str, Count] | None = None
    side: Side | None = None
    beta: Portion | None = None
    rho: Annotated[float, Range(at_least=1)] | None = None
    damping: NotNegative = 1e-4
    seed: Seed = 0
    route: Literal["auto", "exact", "fast"] = "auto"
    base: str = "untouched"
    freeze_a: bool = False
    modules_to_save: Names = ()
    show_progress: bool = True


@dataclass(frozen=True)
class MethodRequest(MethodOptions):
    """What `prepare_method` was asked for, and what there is to do it with.

    Attributes:
        store: covariances, of what comes first in `Method.covariances`.
        task_store: those of the task, for a method that has both in `Method.covariances`.
        plan: the plan that `Method.plan` made for an equal request, so that it is not made again.
    """

    store: CovarianceStore | None = None
    task_store: CovarianceStore | None = None
    plan: AdapterPlan | None = None


OF_ADAPTERS = ("a_norm", "freeze_a", "roles")
OF_PLANS = (
    "base",
    "beta",
    "budget",
    "damping",
    "dynamic_covariance",
    "dynamic_rank",
    "max_rank",
    "min_rank",
    "route",
    "side",
)
_OPTIONS = (*OF_ADAPTERS, *OF_PLANS, "rho", "modules_to_save")


@dataclass(frozen=True)
class Prepared:
    """A model ready to train.

    Attributes:
        model: with `requires_grad` set; a `PeftModel` for the adapters, else the model itself.
        trainable, total: numbers of parameters.
    """

    method: str
    model: nn.Module
    trainable: int
    total: int


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        name: key in `METHODS`.
        description: one line.
        source: the paper.
        covariances: of what it needs covariances: "knowledge" (to keep), "task" (to learn), both, or nothing. The first
            is the request's `store`, the second its `task_store`.
        attach: (bare model, request) -> the model to train.
        detach: the model that was trained -> the original bare model.
        plan: (bare model, request) -> the plan that `attach` would make; None for a method without plans.
        takes: options of the request that not every method has; any other than these is refused. A plan refuses
            besides what its own method does not take.
    """

    name: str
    description: str
    source: str
    covariances: tuple[str, ...]
    attach: Callable[[nn.Module, MethodRequest], nn.Module]
    detach: Callable[[nn.Module], nn.Module]
    plan: Callable[[nn.Module, MethodRequest], AdapterPlan] | None = None
    takes: tuple[str, ...] = ()

    @property
    def needs_store(self) -> bool:
        return bool(self.covariances)

    @property
    def has_rank(self) -> bool:
        """Is what it trains an adapter, whose rank the layers have to take?"""
        return "roles" in self.takes

    def prepare(self, model: nn.Module, request: MethodRequest) -> Prepared:
        """Make `model` ready to train.

        Raises:
            CordaError: a store is missing, an option the method does not have, or what `plan_adapter` raises.
        """
        for of, argument in zip(self.covariances, ("store", "task_store"), strict=False):
            if getattr(request, argument) is None:
                raise CordaError(
                    f"method {self.name!r} takes its directions from data: pass {argument}=, from collect_covariance "
                    f"of the {of}"
                )
        self.check_options(request)
        ready = self.attach(model, request)
        trainable = sum(p.numel() for p in ready.parameters() if p.requires_grad)
        return Prepared(self.name, ready, trainable, sum(p.numel() for p in ready.parameters()))

    def check_options(self, request: MethodRequest) -> None:
        """Raise a `CordaError` for an option that the method does not have, or that is out of range."""
        for option in _OPTIONS:
            value = getattr(request, option)
            if option not in self.takes and value != getattr(MethodRequest, option):
                raise CordaError(
                    f"method {self.name!r} has no {option}= (got {value!r}); leave it out"
                )
        check_options(request, MethodOptions)
