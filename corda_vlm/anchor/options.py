"""How strongly a training is held to the knowledge; read before PyTorch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from corda_vlm.options import Count, NotNegative, check_options


@dataclass(frozen=True, kw_only=True)
class AnchorOptions:
    """The penalty on changed outputs on the knowledge.

    Attributes:
        anchor: Its weight in the loss, for any method; it needs covariances of the knowledge. With 0 the penalty may
            be logged all the same, as a forecast of what is forgotten.
        anchor_every: It is added at every so many steps only, with so many times the weight.
    """

    anchor: NotNegative = 0.0
    anchor_every: Count = 1

    def __post_init__(self) -> None:
        check_options(self)
