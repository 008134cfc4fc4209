"""The model as it was before training, while it is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from corda_vlm.adapter import at_scale
from corda_vlm.adapter.interpolate import LEAVE_THE_BASE
from corda_vlm.adapter.paired import PairedConfig, trained
from corda_vlm.families import unwrap
from corda_vlm.families.base import evaluating


class Before:
    """Runs a model as it was when this was made: with its adapter off where that is the same, else by a frozen copy.

    A copy takes the memory of the model: for weights that are trained themselves, and starts that change the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._off = _switch(model)
        self._copy = None
        if self._off is None:
            self._copy = copy.deepcopy(model).requires_grad_(False).eval()

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """The bare model as it was, without gradients, dropout off."""
        with torch.no_grad():
            if self._copy is not None:
                yield unwrap(self._copy)
                return
            assert self._off is not None
            with evaluating(self.model), self._off():
                yield unwrap(self.model)
        # autocast keeps casts of weights, and those made here know no gradient
        torch.clear_autocast_cache()


def _switch(model: nn.Module) -> Callable[[], AbstractContextManager[Any]] | None:
    """What turns the adapter off; None where that would not be the model as it was."""
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[str(model.active_adapter)]
    if isinstance(config, PairedConfig):
        if config.base != "residual":
            return model.disable_adapter
        return None if config.modules_to_save else (lambda: at_scale(model, 0.0))
    left = str(getattr(config, "init_lora_weights", None)).lower() in LEAVE_THE_BASE
    return model.disable_adapter if left and _starts_at_zero(model) else None


def _starts_at_zero(model: PeftModel) -> bool:
    """Is every adapter's product zero now, so that the model is its base?"""
    return all(
        not all(bool(factor.any()) for factor in trained(layer, name))
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for name in layer.active_adapters
        if name in layer.lora_B
    )
