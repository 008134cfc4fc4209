"""Which directions of a weight matrix a method adapts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Components = Literal["smallest", "largest"]
Side = Literal["output", "input"]
Directions = Literal[
    "spectrum", "contrast", "qr", "gradient", "gradient-pair", "gradient-rest", "error"
]

MODES: dict[str, Components] = {
    "kpm": "smallest",  # knowledge-preserved: adapt what the knowledge uses least
    "ipm": "largest",  # instruction-previewed: adapt what the new task uses most
}

# None: "auto", the input side where a layer has more inputs than outputs. An output-side basis reaches `out`
# directions of the inputs at most, so not their null space there.
SIDES: dict[str, Side | None] = {"output": "output", "input": "input", "auto": None}


@dataclass(frozen=True)
class PlanMethod:
    """How a method of `plan_adapter` chooses directions.

    `B A = Q Qᵀ W` with Q from the eigenvectors of `W C^2p Wᵀ`, or `W P Pᵀ` with P from those of C.

    Attributes:
        power: p, of the covariance in `W C^p`.
        components: "smallest" or "largest"; None: the mode decides.
        side: "output" or "input".
        source: the paper.
        free_side: whether `side=` of `plan_adapter` may move it to the other side.
        directions: what they come from: the "spectrum" of `W C^p`, or of the "contrast" of the knowledge's
            covariances and the new task's, which `beta=` weighs against each other; "qr", the first columns of `W = Q R`; or
            the gradient of the new task's loss: "gradient" in `G C^p`, "gradient-pair" on both sides of G, as LoRA-GA takes
            them, and "gradient-rest" in what of G lies off the weight's and the knowledge's principal directions; or "error", what
            quantising took off W.
    """

    power: float
    components: Components | None
    side: Side
    source: str
    free_side: bool = False
    directions: Directions = "spectrum"

    @property
    def contrast(self) -> bool:
        """Does it take the covariances of the new task too?"""
        return self.directions == "contrast"

    @property
    def of_gradient(self) -> bool:
        """Does it take the gradient of the new task's loss?"""
        return self.directions.startswith("gradient")

    @property
    def corrects(self) -> bool:
        """Is it a start for a quantised base alone, which what quantising took away is added to?"""
        return self.directions == "error"

    @property
    def has_rounds(self) -> bool:
        """Does it weigh one covariance of the knowledge, so that a site may choose among several?"""
        return self.needs_store and self.directions in ("spectrum", "qr")

    @property
    def needs_store(self) -> bool:
        return self.power != 0

    def side_of(self, shape: tuple[int, int], wanted: str | None) -> Side:
        """The side at a site of this (out, inp) shape, `wanted` being one of `SIDES` or None for the method's own."""
        if wanted is None:
            return self.side
        out, inp = shape
        return SIDES[wanted] or ("input" if inp > out else "output")


PLAN_METHODS: dict[str, PlanMethod] = {
    "corda": PlanMethod(1.0, None, "output", "CorDA, arXiv 2406.05223", free_side=True),
    "lora-null": PlanMethod(1.0, "smallest", "input", "LoRA-Null, arXiv 2503.02659"),
    "sc-lora": PlanMethod(
        0.5, "largest", "output", "SC-LoRA, arXiv 2505.23724", directions="contrast"
    ),
    "pissa": PlanMethod(0.0, "largest", "output", "PiSSA, arXiv 2404.02948"),
    "milora": PlanMethod(0.0, "smallest", "output", "MiLoRA, arXiv 2406.09044"),
    "corda-natural": PlanMethod(
        -0.5,
        "largest",
        "input",
        "natural gradient in the metric of the knowledge",
        directions="gradient",
    ),
    "lora-ga": PlanMethod(
        0.0, "largest", "input", "LoRA-GA, arXiv 2407.05000", directions="gradient-pair"
    ),
    "keep-lora": PlanMethod(
        0.5, "largest", "input", "KeepLoRA, arXiv 2601.19659", directions="gradient-rest"
    ),
    "qera": PlanMethod(0.5, "largest", "output", "QERA, arXiv 2410.06040", directions="error"),
    "loftq": PlanMethod(0.0, "largest", "output", "LoftQ, arXiv 2310.08659", directions="error"),
    "olora": PlanMethod(0.0, "largest", "output", "OLoRA, arXiv 2406.01775", directions="qr"),
}
