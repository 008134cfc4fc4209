"""What a model says must be finite numbers: NaN is no wrong answer, and has no score."""

from __future__ import annotations

import torch
from torch import Tensor

from corda_vlm.errors import NotFiniteError


class FiniteCheck:
    """Looks at a model's outputs, batch after batch, and stops at the first that holds NaN or Inf.

    Args:
        what: names the outputs in the message, e.g. "images".
    """

    def __init__(self, what: str) -> None:
        self.what, self.seen = what, 0

    def __call__(self, outputs: Tensor) -> None:
        """Look at a batch of outputs, one a row.

        Raises:
            NotFiniteError: some are not finite; says how many of how many.
        """
        sound = torch.isfinite(outputs.reshape(len(outputs), -1)).all(1)
        self.seen += len(outputs)
        broken = len(outputs) - int(sound.sum())
        if broken:
            raise NotFiniteError(
                f"the model's output is NaN or Inf on {broken:,} of {self.seen:,} {self.what} measured, so there is no "
                "score. Measure it in float32 (without bf16, dtype float32); a model that was trained diverged: train it "
                "again with a lower learning rate"
            )
