"""Which directions of a weight matrix a method adapts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Components = Literal["smallest", "largest"]
Side = Literal["output", "input"]
Route = Literal["auto", "exact", "fast"]

MODES: dict[str, Components] = {
    "kpm": "smallest",  # knowledge-preserved: adapt what the knowledge uses least
    "ipm": "largest",  # instruction-previewed: adapt what the new task uses most
}


@dataclass(frozen=True)
class Basis:
    """A row of method.md's table: `B A = Q Qᵀ W` with Q from the eigenvectors of `W C^2p Wᵀ`.

    Attributes:
        power: p, of the covariance in `W C^p`.
        components: "smallest" or "largest"; None: the mode decides.
        side: "output" or "input".
        source: the paper.
    """

    power: float
    components: Components | None
    side: Side
    source: str

    @property
    def needs_store(self) -> bool:
        return self.power != 0


PLAN_METHODS: dict[str, Basis] = {
    "corda": Basis(1.0, None, "output", "CorDA, arXiv 2406.05223"),
    "pissa": Basis(0.0, "largest", "output", "PiSSA, arXiv 2404.02948"),
    "milora": Basis(0.0, "smallest", "output", "MiLoRA, arXiv 2406.09044"),
    "olora": Basis(
        0.0, "largest", "output", "OLoRA, arXiv 2406.01775: the first columns of W = Q R"
    ),
}
