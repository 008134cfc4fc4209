"""What has to hold before a plan is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from corda_vlm.covariance import CovarianceStore, GradientStore
from corda_vlm.decompose.gradient import check_pair_rank
from corda_vlm.distributed.agree import same_everywhere
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.plan.bases import PLAN_METHODS, PlanMethod
from corda_vlm.plan.options import PlanOptions, needs_gradient, rule_of
from corda_vlm.same_model import is_made_from
from corda_vlm.sites import model_fingerprint


def check_processes(
    fingerprint: str, asked: PlanOptions, *stores: CovarianceStore | GradientStore | None
) -> None:
    """Raise `CordaError`, on every process of a distributed run alike, unless all plan the same."""
    made_from = [None if store is None else store.data_fingerprint for store in stores]
    same_everywhere(
        "what is to be planned",
        {
            "the model": fingerprint,
            "the data of the stores": made_from,
            **dataclasses.asdict(asked),
        },
        "They deal the sites out to each other: give all of them the same model, stores and options",
    )


def check_stores(
    asked: PlanOptions,
    basis: PlanMethod,
    store: CovarianceStore | None,
    task_store: CovarianceStore | None,
    gradient: GradientStore | None,
) -> None:
    """Raise a `CordaError` for covariances that the method needs and is not given, or is given and does not take."""
    method = asked.method
    if store is None and basis.needs_store:
        raise CordaError(
            f"method {method!r} takes its directions from data: pass the store of collect_covariance. "
            f"Without data: {', '.join(sorted(m for m, b in PLAN_METHODS.items() if not b.needs_store))}."
        )
    if basis.contrast and task_store is None:
        raise CordaError(
            f"method {method!r} weighs the new task against the knowledge: pass the covariances of the new task as "
            "task_store=, beside those of the knowledge in store"
        )
    _check_gradient(asked, basis, gradient)
    if not basis.contrast and task_store is not None:
        raise CordaError(
            f"method {method!r} takes one store of covariances; leave task_store= out"
            + (", and for mode='ipm' pass the task's as store" if basis.components is None else "")
        )


def _check_gradient(asked: PlanOptions, basis: PlanMethod, gradient: GradientStore | None) -> None:
    method = asked.method
    if needs_gradient(method, asked) == (gradient is not None):
        return
    if gradient is not None:
        takers = ", ".join(sorted(m for m, b in PLAN_METHODS.items() if b.of_gradient))
        raise CordaError(
            f"method {method!r} takes no gradient; leave gradient= out, or take one of {takers}, or share ranks out by a rule "
            "that looks at it: dynamic_rank=True, rank_rule='task'"
        )
    why = f"method {method!r}" if basis.of_gradient else f"rank rule {rule_of(method, asked)!r}"
    raise CordaError(
        f"{why} looks at the gradient of the new task's loss: pass gradient=, from task_gradient or collect_gradient "
        "(corda-vlm gradient, and plan --gradient)"
    )


def check_made_from(model: nn.Module, store: CovarianceStore | GradientStore, of: str) -> None:
    """Raise a `ForeignFileError` unless the store was collected from this model, or from one as of `same_model`."""
    if not is_made_from(model, store.model_fingerprint, store.model_signs, f"the {of}"):
        raise ForeignFileError(
            f"the {of} were collected from the model {store.model_fingerprint}, and this one is "
            f"{model_fingerprint(model)}: collect them from this model, or load that one"
        )


def check_rank(shapes: Mapping[str, tuple[int, int]], rank: int, method: str = "") -> None:
    """Raise a `CordaError` that names the first site whose (out, inp) weight cannot have this rank, by this method."""
    basis = PLAN_METHODS.get(method)
    for name, (out, inp) in shapes.items():
        if basis is not None and basis.directions == "gradient-pair":
            check_pair_rank((out, inp), rank, f"site {name!r}: ")
        if not 1 <= rank <= min(out, inp):
            raise CordaError(
                f"site {name!r}: rank {rank} is outside 1 to {min(out, inp)}, the full rank of its {out}×{inp} weight; "
                "choose a rank within, or leave the site out with towers= or roles="
            )
