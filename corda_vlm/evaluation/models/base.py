"""What all ways of running a model in an evaluation have in common: how it is run, and that it is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from corda_vlm.distributed.deal import ALONE, Share
from corda_vlm.distributed.values import values_everywhere
from corda_vlm.families.base import evaluating

_Key = TypeVar("_Key")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class MeasuredModel:
    """A model that one evaluation runs; its mode is as before afterwards.

    Attributes:
        batch_size: examples at a time.
        bf16: run it under bfloat16 autocast; similarities and probabilities are computed in float32 all the same.
        workers: threads that decode images.
        share: of the batches, where several processes measure together; each then has the results of all.
    """

    model: nn.Module
    batch_size: int = field(default=64, kw_only=True)
    bf16: bool = field(default=False, kw_only=True)
    workers: int = field(default=0, kw_only=True)
    share: Share = field(default=ALONE, kw_only=True)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def cast(self, pixels: Tensor) -> Tensor:
        """A model kept in half precision wants its images so; token ids have no such precision."""
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        if weight is None or self.bf16 or not pixels.is_floating_point():
            return pixels
        return pixels.to(weight.dtype)

    @contextmanager
    def running(self) -> Iterator[None]:
        with (
            evaluating(self.model),
            torch.no_grad(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            yield

    def together(
        self,
        what: str,
        make: Callable[[], dict[_Key, _Result]],
        types: tuple[type, ...] = (),
    ) -> dict[_Key, _Result]:
        """What `make` gives for this process's share, with that of all others.

        Args:
            what: names it, for messages.
            types: the dataclasses that it holds.

        Raises:
            CordaError: it failed on any process, or one has ended.
        """
        if self.share.is_all:
            return make()
        every = values_everywhere(what, make, types)
        return {key: result for own in every for key, result in own.items()}
