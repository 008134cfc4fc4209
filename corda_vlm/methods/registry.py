"""All methods by name."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from corda_vlm.adapter.options import AttachOptions
from corda_vlm.errors import UnknownNameError
from corda_vlm.lazy import later
from corda_vlm.methods.method import OF_ADAPTERS, OF_PLANS, Method, MethodRequest
from corda_vlm.methods.options import MethodKeywords
from corda_vlm.options import as_keywords, options_from
from corda_vlm.plan.options import DecompositionOptions, Mode, takes_gradient
from corda_vlm.registries import register

if TYPE_CHECKING:
    from torch import nn

    from corda_vlm.covariance import CovarianceStore, GradientStore
    from corda_vlm.plan import AdapterPlan

logger = logging.getLogger(__name__)


def prepare_method(
    name: str,
    model: nn.Module,
    *,
    store: CovarianceStore | None = None,
    task_store: CovarianceStore | None = None,
    gradient: GradientStore | None = None,
    show_progress: bool = True,
    **options: Unpack[MethodKeywords],
) -> nn.Module:
    """The model ready to train by method `name`, `requires_grad` set.

    Args:
        store, task_store, gradient, show_progress: as in `MethodRequest`.
        options: of `MethodOptions`.

    Raises:
        UnknownNameError: unknown method, or an option that there is not.
        CordaError: as `Method.prepare`.
    """
    given = {
        **options,
        "store": store,
        "task_store": task_store,
        "gradient": gradient,
        "show_progress": show_progress,
    }
    request = options_from(MethodRequest, given, "prepare_method")
    prepared = get_method(name).prepare(model, request)
    if prepared.penalty is not None:
        logger.warning(
            "method %r has a term of the loss of its own, which a model alone does not carry: take "
            "get_method(%r).prepare(model, MethodRequest(...)) and give its penalty to train as extra_loss",
            name,
            name,
        )
    return prepared.model


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


def register_method(method: Method) -> Method:
    """Make a method of your own known by its name, in configs and to `prepare_method`. Returns it.

    Raises:
        CordaError: another method has that name.
    """
    return register(METHODS, "method", method.name, method)


_restore = later("corda_vlm.adapter.wrapped.wrap", "restore")


def _planned(
    name: str,
    description: str,
    source: str,
    covariances: tuple[str, ...],
    method: str,
    mode: Mode = "kpm",
    freeze_a: bool = False,
    gradient: bool = False,
) -> Method:
    """A method whose adapter is attached from a plan."""

    def make(model: nn.Module, request: MethodRequest) -> AdapterPlan:
        from corda_vlm.plan import plan_adapter

        return plan_adapter(
            model,
            request.store,
            method=method,
            mode=mode,
            task_store=request.task_store if len(covariances) == 2 else None,
            gradient=request.gradient if takes_gradient(method, request) else None,
            show_progress=request.show_progress,
            **as_keywords(request, DecompositionOptions),
        )

    def attach(model: nn.Module, request: MethodRequest) -> nn.Module:
        from corda_vlm.adapter.attach import attach_adapter

        options = as_keywords(request, AttachOptions)
        options["freeze_a"] |= freeze_a
        return attach_adapter(model, request.plan or make(model, request), **options)

    takes = (*OF_ADAPTERS, *OF_PLANS, "modules_to_save")
    return Method(
        name,
        description,
        source,
        covariances,
        attach,
        _restore,
        make,
        takes,
        gradient=gradient,
        plan_method=method,
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "full",
            "every parameter of the chosen towers is trained",
            "the usual baseline",
            (),
            later("corda_vlm.methods.bare", "full"),
            later("corda_vlm.methods.bare", "cannot_detach"),
        ),
        Method(
            "linear-probe",
            "the model is frozen, only a classification head on its embeddings is trained",
            "CLIP, arXiv 2103.00020",
            (),
            later("corda_vlm.methods.bare", "freeze"),
            later("corda_vlm.methods.bare", "unfreeze"),
            loss="linear",
            changes_layers=False,
        ),
        Method(
            "lora",
            "low-rank adapter, A random and B zero",
            "LoRA, arXiv 2106.09685",
            (),
            partial(later("corda_vlm.methods.plain", "plain"), use_dora=False),
            _restore,
            takes=(*OF_ADAPTERS, "modules_to_save"),
        ),
        Method(
            "dora",
            "LoRA, with magnitude and direction of the weights apart",
            "DoRA, arXiv 2402.09353",
            (),
            partial(later("corda_vlm.methods.plain", "plain"), use_dora=True),
            _restore,
            takes=(*OF_ADAPTERS, "modules_to_save"),
        ),
        Method(
            "eva",
            "LoRA, A the directions in which the new task's activations vary most, ranks by their share of variance",
            "EVA, arXiv 2410.07170",
            ("task",),
            later("corda_vlm.methods.plain", "eva"),
            _restore,
            takes=(*OF_ADAPTERS, "rho"),
        ),
        Method(
            "mica",
            "LoRA, B the smallest output directions of W and frozen, A zero",
            "MiCA, arXiv 2604.01694",
            (),
            partial(later("corda_vlm.methods.plain", "plain"), init="mica"),
            _restore,
            takes=("roles", "targets"),  # A alone is trained, and from zero
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
            "corda-natural",
            "adapts what lowers the new task's loss most for what it changes of the knowledge's outputs",
            "a natural-gradient step of low rank, the knowledge's covariance as its metric; see docs",
            ("knowledge",),
            "corda-natural",
            gradient=True,
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
        _planned(
            "lora-ga",
            "adapts the largest components of the gradient of the new task's loss",
            "LoRA-GA, arXiv 2407.05000",
            (),
            "lora-ga",
            gradient=True,
        ),
        _planned(
            "keep-lora",
            "A the gradient's directions off what weight and knowledge use most, and frozen",
            "KeepLoRA, arXiv 2601.19659",
            ("knowledge",),
            "keep-lora",
            freeze_a=True,
            gradient=True,
        ),
    )
}
