"""What a training checks of its model, and what it changes of it while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from corda_vlm.anchor import Anchor
from corda_vlm.errors import CordaError
from corda_vlm.families import detect_family
from corda_vlm.families.base import unwrap
from corda_vlm.sites import lies_in
from corda_vlm.train.objectives import Objective
from corda_vlm.train.options import TrainOptions
from corda_vlm.train.terms.term import check_weight


def check_trainable(model: nn.Module, objective: Objective, options: TrainOptions) -> None:
    if objective.head is None and not any(p.requires_grad for p in model.parameters()):
        raise CordaError(
            f"nothing to train: no parameter of {type(unwrap(model)).__name__} requires a gradient. Prepare it "
            "with a method (lora, corda-kpm, full, ...), or train a head (train_head, or loss: linear)."
        )

    if options.projector_learning_rate is not None and not projector_parameters(model):
        raise CordaError(
            f"projector_learning_rate is {options.projector_learning_rate}, and nothing of a projector is trained: adapt "
            "the tower projector, train it whole by modules_to_save, or leave the rate out"
        )


def checkpointing(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which blocks compute their activations again for their gradients.

    Not PyTorch's reentrant kind, which gives no gradients to adapters where no input of a block has one.

    Raises:
        CordaError: the model cannot.
    """
    bare = unwrap(model)
    if not getattr(bare, "supports_gradient_checkpointing", False):
        raise CordaError(
            f"gradient_checkpointing is for models of transformers that support it; {type(bare).__name__} does not: leave "
            "it out, and take a smaller batch_size with gradient_accumulation"
        )

    @contextmanager
    def on() -> Iterator[None]:
        before = bare.is_gradient_checkpointing
        bare.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            if not before:
                bare.gradient_checkpointing_disable()

    return on()


def check_anchor(model: nn.Module, anchor: Anchor | None, weight: float) -> None:
    check_weight(weight, "anchor")
    if anchor is None and weight > 0:
        raise CordaError(
            f"anchor_weight is {weight}, but there is no anchor; pass anchor=anchor_penalty(model, store)"
        )
    if anchor is not None and anchor.model is not unwrap(model):
        raise CordaError(
            "the anchor was built for another model than the one to train; build it with anchor_penalty(model, store) "
            "for this one"
        )


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """The Trainer leaves the model in training mode and writes `use_cache` into its configuration."""
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    former = dict(vars(config)) if config is not None else {}
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        if config is not None and "use_cache" not in former:
            vars(config).pop("use_cache", None)
        elif config is not None:
            config.use_cache = former["use_cache"]


def projector_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained of the projector: of its adapters, of its trained copy, or its own weights."""
    bare = unwrap(model)
    family = detect_family(bare)
    paths = () if family.generative is None else family.generative.projector(bare)
    return [
        parameter
        for name, parameter in bare.named_parameters()
        if parameter.requires_grad and lies_in(family.canonical(bare, name), paths)
    ]
