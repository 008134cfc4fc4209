"""What a method is, and what it can be asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corda_vlm.errors import CordaError
from corda_vlm.methods.options import MethodOptions
from corda_vlm.options import check_options, option_names
from corda_vlm.plan.options import (
    DecompositionOptions,
    check_plan,
    needs_gradient,
    takes_gradient,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from corda_vlm.covariance import CovarianceStore, GradientStore
    from corda_vlm.plan import AdapterPlan


@dataclass(frozen=True, kw_only=True)
class MethodRequest(MethodOptions):
    """What `prepare_method` was asked for, and what there is to do it with.

    Attributes:
        store: covariances, of what comes first in `Method.covariances`.
        task_store: those of the task, for a method that has both in `Method.covariances`.
        gradient: of the new task's loss, for a method that has `Method.gradient`.
        plan: the plan that `Method.plan` made for an equal request, so that it is not made again.
        show_progress: show how far the plan is.
    """

    store: CovarianceStore | None = None
    task_store: CovarianceStore | None = None
    gradient: GradientStore | None = None
    plan: AdapterPlan | None = None
    show_progress: bool = True

    def __post_init__(self) -> None:
        check_options(self, MethodOptions)


OF_ADAPTERS = ("a_norm", "freeze_a", "roles", "targets")
OF_PLANS = (
    *sorted({*option_names(DecompositionOptions)} - {"rank", "towers", "seed", *OF_ADAPTERS}),
    "base",
)
_NOT_OF_ALL = sorted(set(option_names(MethodOptions)) - {"rank", "towers", "seed"})


@dataclass(frozen=True)
class Prepared:
    """A model ready to train.

    Attributes:
        model: with `requires_grad` set; a `PeftModel` for the adapters, else the model itself.
        trainable, total: numbers of parameters.
        penalty: the method's own term of the loss, to be given to `train` as `extra_loss`; None for most.
    """

    method: str
    model: nn.Module
    trainable: int
    total: int
    penalty: Callable[[], Tensor] | None = None


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
        takes: options of the request that not every method has; any other than these is refused, and what the method's
            plan does not take.
        gradient: whether it starts from the gradient of the new task's loss, the request's `gradient`.
        loss: the one that it trains with, whatever loss is asked for, as nothing else of it can be trained; None for any.
        changes_layers: whether training changes what the model's layers give, so that an anchor has something to hold.
        plan_method: key of `PLAN_METHODS`, for a method with plans.
        penalty: (the model to train, request) -> a term that is added to the loss: a function without arguments that looks
            at the weights and gives a scalar, already weighted. None for a method without one.
    """

    name: str
    description: str
    source: str
    covariances: tuple[str, ...]
    attach: Callable[[nn.Module, MethodRequest], nn.Module]
    detach: Callable[[nn.Module], nn.Module]
    plan: Callable[[nn.Module, MethodRequest], AdapterPlan] | None = None
    takes: tuple[str, ...] = ()
    gradient: bool = False
    loss: str | None = None
    changes_layers: bool = True
    plan_method: str | None = None
    penalty: Callable[[nn.Module, MethodRequest], Callable[[], Tensor]] | None = None

    @property
    def needs_store(self) -> bool:
        return bool(self.covariances)

    @property
    def has_rank(self) -> bool:
        """Is what it trains an adapter, whose rank the layers have to take?"""
        return "roles" in self.takes

    def takes_gradient(self, options: DecompositionOptions) -> bool:
        """Does it look at the gradient of the new task's loss, with these options and where it is given?"""
        planned = self.plan_method
        return self.gradient or (planned is not None and takes_gradient(planned, options))

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
        if request.gradient is None:
            self._check_gradient(request)
        self.check_options(request)
        ready = self.attach(model, request)
        trainable = sum(p.numel() for p in ready.parameters() if p.requires_grad)
        total = sum(p.numel() for p in ready.parameters())
        penalty = None if self.penalty is None else self.penalty(ready, request)
        return Prepared(self.name, ready, trainable, total, penalty)

    def _check_gradient(self, request: MethodRequest) -> None:
        """Raise a `CordaError` where there is no gradient of the new task's loss, and has to be one."""
        how = ""
        if self.gradient:
            how = "starts from"
        elif self.plan_method is not None and needs_gradient(self.plan_method, request):
            how = f"with rank_rule={request.rank_rule} looks at"
        if how:
            raise CordaError(
                f"method {self.name!r} {how} the gradient of the new task's loss: pass gradient=, from task_gradient or "
                "collect_gradient"
            )

    def check_options(self, request: MethodRequest) -> None:
        """Raise a `CordaError` for an option that the method does not have, or that is out of range."""
        for option in _NOT_OF_ALL:
            value, default = getattr(request, option), getattr(MethodOptions, option)
            unset = value == default or (isinstance(value, (list, tuple)) and not value)
            if option not in self.takes and not unset:
                raise CordaError(
                    f"method {self.name!r} has no {option}= (got {value!r}); leave it out"
                )
        if self.plan_method is not None:
            check_plan(self.plan_method, request)
