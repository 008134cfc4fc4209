"""Decay towards where the training started, in place of AdamW's, which pulls to zero."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.errors import CordaError


class StartDecay:
    """`½ Σ (p − p₀)²` over the trained matrices p, which were p₀ when this was made.

    Of an adapter these are A and B: weight decay pulls both to zero, which for one that started from a pair is no decay
    of its change. As a term of the loss its gradient goes through Adam like any other.
    """

    def __init__(self, model: nn.Module) -> None:
        # vectors (biases, norms, scales) are left alone, as by weight decay
        self._starts = {
            p: p.detach().clone() for p in model.parameters() if p.requires_grad and p.ndim >= 2
        }
        if not self._starts:
            raise CordaError("start_decay: no matrix of this model is trained; leave it out")

    def __call__(self) -> Float[Tensor, ""]:
        return (
            torch.stack(
                [(p - first).float().square().sum() for p, first in self._starts.items()]
            ).sum()
            / 2
        )


class StartPull(StartDecay):
    """The same decay as AdamW does its own: apart from the gradients. `pull` is called before each step of the optimizer,
    and moves every matrix by its learning rate times the weight of the way back; the value is only logged."""

    @torch.no_grad()
    def pull(self, optimizer: torch.optim.Optimizer, weight: float) -> None:
        """Move what an optimizer trains towards where it started, before it steps."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (first := self._starts.get(parameter)) is not None:
                    parameter.lerp_(first, min(1.0, float(group["lr"]) * weight))
