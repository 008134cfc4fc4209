"""The batch of step n, as a function of n and the seed alone: what makes a resumed training the same one."""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from corda_vlm.data import BatchBuilder
from corda_vlm.errors import DataError


class StepOrder:
    """The records of each step: every one once, then all again in another order; an epoch's last step may have fewer."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.per_epoch = math.ceil(count / batch_size)
        self._kept: tuple[int, np.ndarray] = (-1, np.empty(0))

    def indices(self, step: int) -> np.ndarray:
        """The records of step `step`, a function of it and of the seed alone."""
        epoch, place = divmod(step, self.per_epoch)
        kept, order = self._kept  # read once: the thread that works ahead may be in the next epoch
        if kept != epoch:
            order = np.random.RandomState([self.seed % 2**32, epoch]).permutation(self.count)
            self._kept = (epoch, order)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


class StepBatches(Dataset[dict[str, Tensor]]):
    """Item n is the batch of step n.

    Every epoch goes through the records in an order of its own; its last batch may be smaller. With workers
    the next batches are made while the model trains on this one.
    """

    def __init__(
        self,
        builder: BatchBuilder,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        augment: str = "none",
    ) -> None:
        self.builder, self.batch_size, self.steps = builder, batch_size, steps
        self.seed, self.augment = seed, augment
        self._order = StepOrder(len(builder.data), batch_size, seed)
        self.per_epoch = self._order.per_epoch
        self._ahead = ThreadPoolExecutor(1) if builder.workers > 0 else None
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        if self._ahead is None:
            return self._make(step)
        for later in range(step, min(step + 3, self.steps)):
            if later not in self._coming:
                self._coming[later] = self._ahead.submit(self._make, later)
        return self._coming.pop(step).result()

    def indices(self, step: int) -> np.ndarray:
        """The records of step `step`."""
        return self._order.indices(step)

    def _make(self, step: int) -> dict[str, Tensor]:
        batch = self.builder.batch(self.indices(step))
        if not batch:  # none of its records is of use: the next ones, so that a step is a step
            for later in range(step + 1, step + 1 + self.per_epoch):
                if batch := self.builder.batch(self.indices(later)):
                    break
            else:
                raise DataError(f"{self.builder.data.spec}: not one record is of use")
        if self.augment == "light" and "pixel_values" in batch:
            if batch["pixel_values"].dim() != 4:
                raise DataError(
                    "augment light turns and shifts whole images, and this model reads pieces of them; choose none"
                )
            stream = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
            batch["pixel_values"] = jitter(batch["pixel_values"], stream)
        return batch


def jitter(
    images: Float[Tensor, "b 3 h w"],
    generator: torch.Generator,
    *,
    degrees: float = 10.0,
    shift: float = 0.08,
    zoom: float = 0.15,
) -> Float[Tensor, "b 3 h w"]:
    """Each image turned by up to `degrees`, shifted by up to `shift` of its size and zoomed by up to `zoom`.

    No mirror images: digits and letters have none. What comes in at an edge repeats the edge.
    """
    count = len(images)
    draw = torch.rand(count, 4, generator=generator) * 2 - 1  # (B, 4) in [-1, 1)
    angle = draw[:, 0] * math.radians(degrees)
    size = 1 + draw[:, 1] * zoom
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(
        count, 2, 2
    )
    moved = draw[:, 2:, None] * 2 * shift  # affine_grid's image spans 2 units
    where = torch.cat([turned * size.view(-1, 1, 1), moved], dim=2).to(images.dtype)  # (B, 2, 3)
    grid = F.affine_grid(where, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
