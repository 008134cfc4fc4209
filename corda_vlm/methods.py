"""The ways to fine-tune, side by side under one interface: a name prepares a model, ready to train.

Every method leaves the model's outputs as they were before the first step, up to rounding, and can be undone
with `restore_method`, except full fine-tuning, which keeps nothing of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from corda_vlm.adapter.attach import (
    attach_adapter,
    check_wrapped,
    forget_frozen,
    lora_targets,
    remember_frozen,
    restore,
    wrapping,
)
from corda_vlm.adapter.eva import attach_eva
from corda_vlm.adapter.paired import keep_a_frozen, trained
from corda_vlm.covariance import CovarianceStore
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.plan import AdapterPlan, Route, check_rank, plan_adapter
from corda_vlm.ranks import Bound
from corda_vlm.sites import find_sites, site_shape


@dataclass(frozen=True)
class MethodRequest:
    """What `prepare_method` was asked for; each method takes what it knows.

    Attributes:
        rank: of the adapters; alpha is the same, so scaling is 1.
        store: covariances, of what comes first in `Method.covariances`.
        task_store: those of the task, for a method that has both in `Method.covariances`.
        towers, roles: which sites, as in `find_sites`; None: all.
        a_norm: norm of each row of A at the start, see `plan_adapter`; None: the method's own.
        dynamic_rank, dynamic_covariance, budget, min_rank, max_rank, side, beta: as in `plan_adapter`.
        rho: of eva, see `attach_eva`.
        damping, route, base, freeze_a: as in `plan_adapter` and `attach_adapter`.
        seed: of what is random (LoRA's A, the fast route's starting block).
        plan: the plan that `Method.plan` made for an equal request, so that it is not made again.
    """

    rank: int = 16
    store: CovarianceStore | None = None
    task_store: CovarianceStore | None = None
    towers: Sequence[str] | str | None = None
    roles: Sequence[str] | str | None = None
    a_norm: float | None = None
    dynamic_rank: bool = False
    dynamic_covariance: bool = False
    budget: int | None = None
    min_rank: Bound = 1
    max_rank: Bound | None = None
    side: str | None = None
    beta: float | None = None
    rho: float | None = None
    damping: float = 1e-4
    seed: int = 0
    route: Route = "auto"
    base: str = "untouched"
    freeze_a: bool = False
    show_progress: bool = True
    plan: AdapterPlan | None = None


_OF_PLANS = (
    "dynamic_rank",
    "dynamic_covariance",
    "budget",
    "min_rank",
    "max_rank",
    "side",
    "beta",
)


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
    """

    name: str
    description: str
    source: str
    covariances: tuple[str, ...]
    attach: Callable[[nn.Module, MethodRequest], nn.Module]
    detach: Callable[[nn.Module], nn.Module]
    plan: Callable[[nn.Module, MethodRequest], AdapterPlan] | None = None

    @property
    def needs_store(self) -> bool:
        return bool(self.covariances)

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
        self._refuse_options(request)
        ready = self.attach(model, request)
        trainable = sum(p.numel() for p in ready.parameters() if p.requires_grad)
        return Prepared(self.name, ready, trainable, sum(p.numel() for p in ready.parameters()))

    def _refuse_options(self, request: MethodRequest) -> None:
        options = () if self.plan else _OF_PLANS  # a plan refuses what its method does not take
        options = options if self.name == "eva" else (*options, "rho")
        for option in options:
            value = getattr(request, option)
            if value != getattr(MethodRequest, option):
                raise CordaError(
                    f"method {self.name!r} has no {option}= (got {value!r}); leave it out"
                )


def prepare_method(
    name: str,
    model: nn.Module,
    *,
    rank: int = 16,
    store: CovarianceStore | None = None,
    task_store: CovarianceStore | None = None,
    towers: Sequence[str] | str | None = None,
    roles: Sequence[str] | str | None = None,
    a_norm: float | None = None,
    dynamic_rank: bool = False,
    dynamic_covariance: bool = False,
    budget: int | None = None,
    min_rank: Bound = 1,
    max_rank: Bound | None = None,
    side: str | None = None,
    beta: float | None = None,
    rho: float | None = None,
    damping: float = 1e-4,
    seed: int = 0,
    route: Route = "auto",
    base: str = "untouched",
    freeze_a: bool = False,
    show_progress: bool = True,
) -> nn.Module:
    """The model ready to train by method `name`, `requires_grad` set; arguments as in `MethodRequest`.

    Raises:
        UnknownNameError: unknown method.
        CordaError: as `Method.prepare`.
    """
    request = MethodRequest(
        rank=rank,
        store=store,
        task_store=task_store,
        towers=towers,
        roles=roles,
        a_norm=a_norm,
        dynamic_rank=dynamic_rank,
        dynamic_covariance=dynamic_covariance,
        budget=budget,
        min_rank=min_rank,
        max_rank=max_rank,
        side=side,
        beta=beta,
        rho=rho,
        damping=damping,
        seed=seed,
        route=route,
        base=base,
        freeze_a=freeze_a,
        show_progress=show_progress,
    )
    return get_method(name).prepare(model, request).model


def restore_method(name: str, model: nn.Module) -> nn.Module:
    """Undo `prepare_method`: the original bare model, what was trained dropped.

    Raises:
        UnknownNameError: unknown method.
        CordaError: full fine-tuning keeps nothing of the original; load it again.
    """
    return get_method(name).detach(model)


def get_method(name: str) -> Method:
    """`METHODS[name]`, or `UnknownNameError` with the choices."""
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    return METHODS[name]


# ------------------------------------------------------------------ without an adapter


def _full(model: nn.Module, request: MethodRequest) -> nn.Module:
    prefixes = _tower_prefixes(model, request)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(any(f"{name}.".startswith(prefix) for prefix in prefixes))
    return model


def _tower_prefixes(model: nn.Module, request: MethodRequest) -> list[str]:
    """Dotted prefixes of the chosen towers' parameters; the empty one, which is all, if none or all were chosen.

    A tower is all below the shortest prefix of its sites that no other tower's site shares: what lies beside the towers
    (the embeddings and projection of open_clip's text tower, the logit scale) is trained only with all of them.
    """
    if request.towers is None:
        return [""]
    chosen = {site.name for site in find_sites(model, towers=request.towers)}
    others = [site.name for site in find_sites(model) if site.name not in chosen]
    if not others:
        return [""]
    prefixes = set()
    for name in chosen:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            prefix = ".".join(parts[:length]) + "."
            if not any(other.startswith(prefix) for other in others):
                prefixes.add(prefix)
                break
    return sorted(prefixes)


def _cannot_detach(model: nn.Module) -> nn.Module:
    raise CordaError("full fine-tuning keeps nothing of the original weights; load the model again")


def _freeze(model: nn.Module, request: MethodRequest) -> nn.Module:
    remember_frozen(model)
    return model.requires_grad_(False)


def _unfreeze(model: nn.Module) -> nn.Module:
    forget_frozen(model)
    return model


# ------------------------------------------------------------------ PEFT's own


def _plain(
    *, use_dora: bool = False, init: Literal["mica"] | bool = True
) -> Callable[[nn.Module, MethodRequest], nn.Module]:
    def attach(model: nn.Module, request: MethodRequest) -> nn.Module:
        if init == "mica" and (request.freeze_a or request.a_norm is not None):
            raise CordaError(
                "mica trains A alone, from zero: freeze_a=True leaves nothing to train, and a_norm= nothing to scale; "
                "leave both out"
            )
        sites = find_sites(model, towers=request.towers, roles=request.roles)
        check_rank({site.name: site_shape(model, site.name) for site in sites}, request.rank)
        ranks = {site.name: request.rank for site in sites}
        config = LoraConfig(**lora_targets(ranks), use_dora=use_dora, init_lora_weights=init)
        # unpacked first: PEFT's LoRA on nn.MultiheadAttention applies the delta of out_proj twice
        with wrapping(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            peft_model = get_peft_model(model, config)
            assert isinstance(peft_model, PeftModel)
            check_wrapped(peft_model, ranks, "default")
        return _finished(peft_model, request)

    return attach


def _eva(model: nn.Module, request: MethodRequest) -> nn.Module:
    assert request.store is not None  # checked by `prepare`
    peft_model = attach_eva(
        model,
        request.store,
        rank=request.rank,
        rho=request.rho,
        towers=request.towers,
        roles=request.roles,
    )
    return _finished(peft_model, request)


def _finished(peft_model: PeftModel, request: MethodRequest) -> PeftModel:
    """With A's rows at the norm asked for, and frozen if asked for; B is zero."""
    for layer in peft_model.modules():
        if isinstance(layer, LoraLayer):
            if request.a_norm is not None:
                _, A = trained(layer, "default")  # (r, inp)
                A.data.mul_(request.a_norm / A.data.norm(dim=1, keepdim=True))
            if request.freeze_a:
                keep_a_frozen(layer, "default")
    return peft_model


# ------------------------------------------------------------------ from a plan


def _planned(
    name: str,
    description: str,
    source: str,
    covariances: tuple[str, ...],
    method: str,
    mode: str = "kpm",
    freeze_a: bool = False,
) -> Method:
    def make(model: nn.Module, request: MethodRequest) -> AdapterPlan:
        return plan_adapter(
            model,
            request.store,
            mode=mode,
            rank=request.rank,
            method=method,
            task_store=request.task_store if len(covariances) == 2 else None,
            dynamic_rank=request.dynamic_rank,
            dynamic_covariance=request.dynamic_covariance,
            damping=request.damping,
            a_norm=request.a_norm,
            budget=request.budget,
            min_rank=request.min_rank,
            max_rank=request.max_rank,
            side=request.side,
            beta=request.beta,
            towers=request.towers,
            roles=request.roles,
            route=request.route,
            seed=request.seed,
            show_progress=request.show_progress,
        )

    def attach(model: nn.Module, request: MethodRequest) -> nn.Module:
        plan = request.plan or make(model, request)
        return attach_adapter(model, plan, freeze_a=freeze_a or request.freeze_a, base=request.base)

    return Method(name, description, source, covariances, attach, restore, make)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "full",
            "every parameter of the chosen towers is trained",
            "the usual baseline",
            (),
            _full,
            _cannot_detach,
        ),
        Method(
            "linear-probe",
            "the model is frozen, only a classification head on its embeddings is trained",
            "CLIP, arXiv 2103.00020",
            (),
            _freeze,
            _unfreeze,
        ),
        Method(
            "lora",
            "low-rank adapter, A random and B zero",
            "LoRA, arXiv 2106.09685",
            (),
            _plain(),
            restore,
        ),
        Method(
            "dora",
            "LoRA, with magnitude and direction of the weights apart",
            "DoRA, arXiv 2402.09353",
            (),
            _plain(use_dora=True),
            restore,
        ),
        Method(
            "eva",
            "LoRA, A the directions in which the new task's activations vary most, ranks by their share of variance",
            "EVA, arXiv 2410.07170",
            ("task",),
            _eva,
            restore,
        ),
        Method(
            "mica",
            "LoRA, B the smallest output directions of W and frozen, A zero",
            "MiCA, arXiv 2604.01694",
            (),
            _plain(init="mica"),
            restore,
        ),
        _planned(
            "pissa",
            "adapts the largest components of W",
            "PiSSA, arXiv 2404.02948",
            (),
            "pissa",
        ),
        _planned(
            "milora",
            "adapts the smallest components of W",
            "MiLoRA, arXiv 2406.09044",
            (),
            "milora",
        ),
        _planned(
            "olora",
            "adapts the first orthonormal directions of W = Q R",
            "OLoRA, arXiv 2406.01775",
            (),
            "olora",
        ),
        _planned(
            "corda-kpm",
            "adapts what the knowledge's covariance uses least, to keep it",
            "CorDA, knowledge-preserved mode, arXiv 2406.05223",
            ("knowledge",),
            "corda",
            "kpm",
        ),
        _planned(
            "corda-ipm",
            "adapts what the new task's covariance uses most, to learn it fast",
            "CorDA, instruction-previewed mode, arXiv 2406.05223",
            ("task",),
            "corda",
            "ipm",
        ),
        _planned(
            "lora-null",
            "adapts W within the null space of the knowledge's activations",
            "LoRA-Null, arXiv 2503.02659",
            ("knowledge",),
            "lora-null",
        ),
        _planned(
            "lora-null-frozen",
            "lora-null with A frozen, which keeps every update in that null space",
            "LoRA-Null, the variant with frozen down-projections, arXiv 2503.02659",
            ("knowledge",),
            "lora-null",
            freeze_a=True,
        ),
        _planned(
            "sc-lora",
            "adapts the output directions that the new task uses and the knowledge does not",
            "SC-LoRA, arXiv 2505.23724",
            ("knowledge", "task"),
            "sc-lora",
        ),
    )
}
