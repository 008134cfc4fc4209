"""How strongly a training is held to the knowledge, and in which metric; read before PyTorch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from corda_vlm.errors import CordaError
from corda_vlm.options import Count, NotNegative, check_options

AnchorMetric = Literal["knowledge", "identity", "task"]
OutputSide = Literal["none", "mean", "kfac"]


@dataclass(frozen=True, kw_only=True)
class AnchorOptions:
    """The penalty on changed outputs on the knowledge.

    Attributes:
        anchor: Its weight in the loss, for any method; it needs covariances of the knowledge. With 0 the penalty may
            be logged all the same, as a forecast of what is forgotten.
        anchor_every: It is added at every so many steps only, with so many times the weight.
        anchor_metric: Over which inputs a change of a layer's outputs is measured: those of the knowledge, those of the new task,
            or identity, all directions alike, which is L2 on the relative change of the weights and needs no data.
        anchor_output: How the changes of layers add up: none, each relative to the layer's own outputs; kfac, by what they do to
            the model's output (the penalty is then the squared change of CLIP's unit embedding, or twice the KL of a
            next token), or mean, the same with one number a layer. Both need `calibrate --output-side`.
    """

    anchor: NotNegative = 0.0
    anchor_every: Count = 1
    anchor_metric: AnchorMetric = "knowledge"
    anchor_output: OutputSide = "none"

    def __post_init__(self) -> None:
        check_options(self)
        check_anchor_metric(self.anchor_metric, self.anchor_output)

    def anchors_to(self, metric: AnchorMetric) -> bool:
        """Whether the loss has an anchor of this metric."""
        return self.anchor > 0 and self.anchor_metric == metric

    @property
    def forecasts(self) -> bool:
        """Whether it is the forecast of forgetting too, which is of the knowledge and relative to each layer."""
        return self.anchor_metric == "knowledge" and self.anchor_output == "none"


def check_anchor_metric(metric: str, output_side: str) -> None:
    """Raise `CordaError` for a metric and an output side that contradict each other."""
    if metric == "identity" and output_side != "none":
        raise CordaError(
            f"the anchor's metric is identity, which looks at weights alone, and its output side is {output_side}, which says "
            "what a change of a layer's outputs on data does; leave the output side out, or take the metric knowledge"
        )
