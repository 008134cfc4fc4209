"""Have PEFT wrap a model's layers, and unwrap them: what else the model was comes back to the bit, errors included."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from corda_vlm.adapter.paired import (
    PairedLayer,
    base_of,
)
from corda_vlm.adapter.wrapped.full_modules import unwrap_full_modules
from corda_vlm.errors import CordaError
from corda_vlm.families.layers.attention import pack, unpack

logger = logging.getLogger(__name__)

# Which parameters of a bare model were frozen before an adapter froze them all.
_FROZEN_BEFORE: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def restore(peft_model: nn.Module) -> nn.Module:
    """Take the adapter off: the original bare model, attention packed again; what was trained is dropped.

    The weights are the original ones to the bit where the base was left untouched (our "untouched" mode, and
    PEFT's LoRA and DoRA unless they were merged). In residual mode they are `W₀ + B₀A₀`, the original up to
    rounding in the model's precision: for the exact ones, load the model again. A log line says which.

    Raises:
        CordaError: not a `PeftModel`.
    """
    if not isinstance(peft_model, PeftModel) or not isinstance(peft_model.base_model, BaseTuner):
        raise CordaError(
            f"restore takes a model with an adapter (a PeftModel), not a {type(peft_model).__name__}"
        )
    bare = base_of(peft_model)
    exact = "residual" not in base_modes(peft_model)
    for layer in bare.modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer, PairedLayer) and layer.merged:
            layer.unmerge()
            exact = False
    unwrap_full_modules(bare)  # first: peft would leave the trained copies in place
    peft_model.base_model.unload()
    _tidy(bare)
    logger.info(
        "the original model is back, %s",
        "to the bit" if exact else "up to rounding; load it again for the exact weights",
    )
    return bare


@contextmanager
def wrapping(model: nn.Module) -> Iterator[None]:
    """Unpack, remember what was frozen, and leave the bare model as it was when the block raises."""
    with warnings.catch_warnings():
        # PEFT asks transformers for a name that is going away; nobody who attaches an adapter can help it
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        # a module that is trained whole and tied is saved, exported and loaded as what it has become
        warnings.filterwarnings("ignore", message=".*ensure_weight_tying")
        yield from _wrapping(model)


def _wrapping(model: nn.Module) -> Iterator[None]:
    if isinstance(model, PeftModel):
        yield  # PEFT takes a further adapter back by itself
        return
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise CordaError(
            "this model carries an adapter already; pass the PeftModel, or restore it first"
        )
    remember_frozen(model)
    unpack(model)
    try:
        yield
    except BaseException:
        for parent in list(model.modules()):
            for key, child in list(parent._modules.items()):
                if isinstance(child, BaseTunerLayer):
                    if isinstance(child, PairedLayer):
                        for name in list(child.lora_init_A):
                            child.drop_pair(name)
                    parent._modules[key] = child.get_base_layer()
        _tidy(model)
        raise


def remember_frozen(bare: nn.Module) -> None:
    """Note which parameters are frozen, for `forget_frozen`."""
    frozen = (name for name, p in bare.named_parameters() if not p.requires_grad)
    _FROZEN_BEFORE[bare] = frozenset(frozen)


def forget_frozen(bare: nn.Module) -> None:
    """Set `requires_grad` as it was at `remember_frozen`; all trainable if that was not called."""
    frozen = _FROZEN_BEFORE.pop(bare, frozenset())
    for name, parameter in bare.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name not in frozen)


def _tidy(bare: nn.Module) -> None:
    """Pack attention, and set `requires_grad` as it was before the adapter."""
    pack(bare)
    if "peft_config" in bare.__dict__:
        del bare.peft_config
    forget_frozen(bare)


def base_modes(model: PeftModel) -> list[str]:
    """The base modes of a model's adapters; PEFT's own leave the base untouched."""
    return [getattr(config, "base", "untouched") for config in model.peft_config.values()]
