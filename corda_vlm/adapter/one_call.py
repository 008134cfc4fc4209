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
from corda_vlm.covariance import CovarianceStore, GradientStore, collect_covariance
from corda_vlm.covariance.options import CollectKeywords, CollectOptions
from corda_vlm.covariance.tokens import Masks
from corda_vlm.errors import UnknownNameError
from corda_vlm.families import Batch
from corda_vlm.options import option_names, options_from
from corda_vlm.plan import plan_adapter
from corda_vlm.plan.options import PlanKeywords, PlanOptions


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
    adapter_name: str = "default",
    show_progress: bool = True,
    **options: Unpack[AdaptKeywords],
) -> PeftModel:
    """Calibrate on `batches`, plan and attach, in one call.

    Args:
        model: bare.
        batches: what the knowledge to keep ("kpm") or the new task ("ipm") looks like: a few hundred samples.
        forward, masks, path, device: as of `collect_covariance`.
        task_store, gradient: as of `plan_adapter`.
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
    options_from(PlanOptions, planning, "adapt")  # before a long calibration
    options_from(AttachOptions, attaching, "adapt")
    store = collect_covariance(
        model, batches, forward=forward, masks=masks, path=path, device=device, show_progress=show_progress, **collecting
    )  # fmt: skip
    plan = plan_adapter(
        model, store, task_store=task_store, gradient=gradient, show_progress=show_progress, **planning
    )  # fmt: skip
    return attach_adapter(model, plan, adapter_name=adapter_name, **attaching)
