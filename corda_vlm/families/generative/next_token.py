"""The logits of the next token, at some places of a batch alone."""

from __future__ import annotations

import inspect
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from corda_vlm.families.base import Batch


def next_token_logits(
    model: nn.Module, inputs: Batch, counted: Bool[Tensor, "b l"]
) -> Float[Tensor, "n v"]:
    """The logits that predict the tokens that count, record after record; of long sequences all of them may not fit.

    Args:
        inputs: what the model is called with.
        counted: of the tokens from the second on, as position i predicts token i + 1. At least one counts.
    """
    places = counted.any(0).nonzero()[:, 0]  # (P,)
    net: Any = model
    # As a list: accelerate moves a tensor to the first GPU, and the hidden states are on the last.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = net(**inputs, use_cache=False, logits_to_keep=places.tolist()).logits
    else:
        logits = net(**inputs, use_cache=False).logits[:, places]
    return logits[counted[:, places].to(logits.device)]
