"""How much a change of a layer's outputs counts: relative to them, or by what it does to what the model gives out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corda_vlm.anchor.metric import Metric
from corda_vlm.covariance import CovarianceStore
from corda_vlm.errors import ForeignFileError


@dataclass
class Outputs:
    """The output side of an anchor.

    Attributes:
        kind: "none": `‖ΔW C^½‖² / ‖W C^½‖²`, which the anchor takes the mean of over the layers. "kfac":
            `tr(G ΔW C ΔWᵀ)`, which it sums. "mean": `tr(G) / out · ‖ΔW C^½‖²`, summed as well.
        store: has the G.
    """

    kind: str
    store: CovarianceStore | None

    @property
    def is_sum(self) -> bool:
        return self.kind != "none"

    def weight(self, site: str, size: float, width: int) -> float:
        """What the energy of a layer's change, in whichever metric, is multiplied by.

        Args:
            size: `‖W C^½‖²`.
            width: of its outputs.
        """
        if self.kind == "none":
            return 1 / size if size > 0 else 0.0
        return 1.0 if self.kind == "kfac" else float(self._matrix(site, width).trace()) / width

    def metric(
        self, site: str, width: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Metric | None:
        """Products with G; None where all of a layer's outputs count alike."""
        if self.kind != "kfac":
            return None
        rest = self._matrix(site, width).to(device, dtype)
        return Metric(rest.new_zeros(width, 0), rest)

    def _matrix(self, site: str, width: int) -> Tensor:
        assert self.store is not None
        matrix = self.store.output_side(site).matrix
        if len(matrix) != width:
            raise ForeignFileError(
                f"the output side of {site!r} is {len(matrix)} wide, and the layer has {width} outputs: the store is of "
                "another model"
            )
        return matrix
