"""The model as it was before training, while it is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from corda_vlm.adapter import at_scale
from corda_vlm.adapter.paired import PairedConfig
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


def _switch(model: nn.Module) -> Callable[[], AbstractContextManager[Any]] | None:
    """What turns the adapter off; None where that would not be the model as it was."""
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[str(model.active_adapter)]
    if isinstance(config, PairedConfig):
        residual = config.base == "residual"
        return (lambda: at_scale(model, 0.0)) if residual else model.disable_adapter
    if str(getattr(config, "init_lora_weights", None)).lower() in ("true", "gaussian", "mica"):
        return model.disable_adapter
    return None
