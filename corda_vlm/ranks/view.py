"""What a rule is shown of a site."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SiteView:
    """What a rule sees of a site; what it does not need (`RankRule.needs`) may be None. R is min(out, inp).

    Attributes:
        shape: (out, inp) of its weight.
        spectrum: all R singular values of `W C'`, descending.
        log_compactness: log π of the covariance, 0 or more.
        gradient: the largest singular values of the gradient of the new task's loss in the metric that the method takes it
            in (`G C'^-½` for corda-natural), descending; at least as many as the site may have ranks.
        output_energy: `‖W C'^½‖²` (Frobenius), the mean square of the layer's outputs on the knowledge, or `‖W‖²` where the
            gradient is taken in no metric; None counts as 1.
        task_energy: `‖G Aᵀ‖²` (Frobenius), A being the rows that equal ranks would give, each of norm 1: how fast the new
            task's loss falls along what is offered.
    """

    shape: tuple[int, int]
    spectrum: Float[Tensor, " R"] | None = None
    log_compactness: float | None = None
    gradient: Float[Tensor, " n"] | None = None
    output_energy: float | None = None
    task_energy: float | None = None

    @property
    def price(self) -> int:
        """Parameters of one rank, out + inp."""
        return sum(self.shape)

    @property
    def full(self) -> int:
        """The full rank, min(out, inp)."""
        return min(self.shape)
