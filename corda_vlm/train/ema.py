"""A moving average of what is trained, which is then the result: steadier than the last step, and often closer to the start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from corda_vlm.errors import ForeignFileError
from corda_vlm.tensors import load_tensors, save_tensors

Tensors = tuple[Tensor, ...] | list[Tensor]

FILE = "average.safetensors"
"""The average, in a checkpoint."""


class MovingAverage:
    """PyTorch's exponential moving average of some parameters, in float32.

    The weights of step n count in proportion to `decay ** (last − n)`, from the first step on: the average has no part in where the
    training started, and in a training that is short against 1 / (1 − decay) steps it is near the mean of all.

    Args:
        parameters: what is averaged; others take no memory.
        decay: below 1.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self._average = AveragedModel(self._now(), multi_avg_fn=self._mix)

    def update(self) -> None:
        """Take in what the parameters are now."""
        self._average.update_parameters(self._now())

    @torch.no_grad()
    def settle(self) -> None:
        """Give the parameters their average."""
        for parameter, mean in zip(self.parameters, self._means(), strict=True):
            parameter.copy_(mean)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters are their average within, and afterwards what they were."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        self.settle()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        save_tensors(folder / FILE, self._state(), {})

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ForeignFileError: it has none, or that of other parameters.
        """
        hint = f"delete {folder}, and the training goes on from what was before it"
        saved, own = load_tensors(folder / FILE, "average of weights", hint), self._state()
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in own.items()}:
            raise ForeignFileError(f"{folder / FILE}: an average of other weights; {hint}")
        for name, value in own.items():
            value.copy_(saved[name])

    def _mix(self, means: Tensors, values: Tensors, count: Tensor | int) -> None:
        seen, d = int(count), self.decay
        decay = (
            d * (1 - d**seen) / (1 - d ** (seen + 1))
        )  # of weights d ** (last − n) that add up to 1
        get_ema_multi_avg_fn(decay)(means, values, count)

    def _now(self) -> nn.ParameterList:
        """Those of low precision in float32, where small steps would be lost in rounding."""
        return nn.ParameterList(
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for p in self.parameters
        )

    def _means(self) -> list[Tensor]:
        return [p.detach() for p in self._average.module.parameters()]

    def _state(self) -> dict[str, Tensor]:
        named = {f"{n:06}": mean for n, mean in enumerate(self._means())}
        return {**named, "steps": self._average.n_averaged}
