"""The anchor: how much a model has changed on the knowledge, while it is trained, and as a term of its loss.

Let C be the second moment of a layer's inputs on the knowledge. `‖ΔW C^½‖_F² / ‖W C^½‖_F²` is then the change of the
layer's outputs on that knowledge, relative to the outputs: weight decay in the metric of what is to be kept, towards
the weights the training began with. The anchor is its unweighted mean over the adapted layers.

    anchor = anchor_penalty(model, store)     # after the adapter is attached, before the first step
    loss = task_loss + 30.0 * anchor()

No square root of C is needed: `‖P Q C^½‖² = tr((PᵀP)(Q C Qᵀ))` takes an adapter one product of its `(2r, inp)` factor
with C. A matrix trained in full takes `⟨ΔW, ΔW C⟩`, whose gradient is twice the product that its value needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.anchor.options import AnchorOptions
    from corda_vlm.anchor.penalty import Anchor, anchor_penalty

_HOMES = {"Anchor": "penalty", "AnchorOptions": "options", "anchor_penalty": "penalty"}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
