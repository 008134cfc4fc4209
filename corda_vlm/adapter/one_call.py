"""Calibrate, plan and attach in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from typing_extensions import Unpack

from corda_vlm.adapter.attach import attach_adapter
from corda_vlm.adapter.options import AttachKeywords, AttachOptions
from corda_vlm.covariance import (
    CovarianceStore,
    GradientStore,
    collect_covariance,
    collect_gradient,
)
from corda_vlm.covariance.gradient import Loss
from corda_vlm.covariance.options import CollectKeywords, CollectOptions
from corda_vlm.covariance.tokens import Masks
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families import Batch
from corda_vlm.families.options import SiteOptions
from corda_vlm.options import as_keywords, option_names, options_from
from corda_vlm.plan import PLAN_METHODS, plan_adapter
from corda_vlm.plan.options import PlanKeywords, PlanOptions, needs_gradient


class AdaptKeywords(CollectKeywords, PlanKeywords, AttachKeywords, total=False):
    """`CollectOptions`, `PlanOptions` and `AttachOptions` as keywords of a function."""


def adapt(
    model: nn.Module,
    batches: Iterable[Batch | torch.Tensor | Sequence[Any]],
    *,
    forward: Callable[[nn.Module, Batch], object] | None = None,
    masks: Callable[[Batch], Masks] | None = None,
    path: str | Path | None = None,
    device: torch.device | str | None = None,
    task_store: CovarianceStore | None = None,
    gradient: GradientStore | None = None,
    task_batches: Iterable[Batch | torch.Tensor | Sequence[Any]] | None = None,
    loss: Loss | None = None,
    adapter_name: str = "default",
    show_progress: bool = True,
    **options: Unpack[AdaptKeywords],
) -> PeftModel:
    """Calibrate on `batches`, plan and attach, in one call.

    Args:
        model: bare.
        batches: what the knowledge to keep (or, in mode "ipm", the new task) looks like: a few hundred samples.
        forward, masks, path, device: as of `collect_covariance`.
        task_store, gradient: as of `plan_adapter`.
        task_batches, loss: what the new task looks like, and its loss, in place of `gradient`: as of `collect_gradient`. With
            one of the two, the method is "corda-natural" unless another is named.
        adapter_name: as of `attach_adapter`.
        options: of `CollectOptions`, `PlanOptions` and `AttachOptions`.

    Raises:
        UnknownNameError: an option that none of them has; the message lists those there are.
        CordaError: as the three functions raise it.
    """
    kinds = (CollectOptions, PlanOptions, AttachOptions)
    names = [option_names(kind) for kind in kinds]
    for option in options:
        if not any(option in of for of in names):
            raise UnknownNameError("option of adapt", option, set().union(*names))
    given: dict[str, Any] = dict(options)
    collecting, planning, attaching = ({k: v for k, v in given.items() if k in of} for of in names)
    has_gradient = gradient is not None or task_batches is not None
    # before a long calibration
    plans = options_from(PlanOptions, planning, "adapt").settled(has_gradient)
    options_from(AttachOptions, attaching, "adapt")
    _check_task(plans, gradient, task_batches, loss)
    store = collect_covariance(
        model, batches, forward=forward, masks=masks, path=path, device=device, show_progress=show_progress, **collecting
    )  # fmt: skip
    if task_batches is not None:
        sites = as_keywords(plans, SiteOptions)
        gradient = collect_gradient(model, task_batches, loss, show_progress=show_progress, **sites)
    plan = plan_adapter(
        model, store, task_store=task_store, gradient=gradient, show_progress=show_progress, **planning
    )  # fmt: skip
    return attach_adapter(model, plan, adapter_name=adapter_name, **attaching)


def _check_task(
    plans: PlanOptions,
    gradient: GradientStore | None,
    task_batches: Iterable[Batch | torch.Tensor | Sequence[Any]] | None,
    loss: Loss | None,
) -> None:
    """Raise a `CordaError` unless a method that starts from the new task's gradient, and no other, is given one."""
    if loss is not None and task_batches is None:
        raise CordaError(
            "loss= is that of task_batches=, which are not given; give both, or neither"
        )
    given = (gradient is not None) + (task_batches is not None)
    method = plans.method
    if needs_gradient(method, plans):
        if given != 1:
            what = f"method {method!r} starts from"
            if not PLAN_METHODS[method].of_gradient:
                what = f"rank rule {plans.rank_rule!r} looks at"
            raise CordaError(
                f"{what} the gradient of the new task's loss: give task_batches= (and loss=), or "
                "gradient=, one of the two"
            )
    elif given:
        takers = ", ".join(sorted(name for name, m in PLAN_METHODS.items() if m.of_gradient))
        raise CordaError(
            f"method {method!r} does not look at the new task's loss; leave task_batches= and gradient= out, or take one of "
            f"{takers}"
        )
