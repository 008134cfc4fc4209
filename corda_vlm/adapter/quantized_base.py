"""A base that is quantised once the adapter is attached: the pair stays in sixteen bits or more, and what is left is rounded."""

from __future__ import annotations

from peft import PeftModel

from corda_vlm.adapter.paired import PairedConfig
from corda_vlm.errors import CordaError
from corda_vlm.families.loading.quantization import quantize_model
from corda_vlm.families.options import Quantization


def quantize_base(peft_model: PeftModel, kind: Quantization) -> PeftModel:
    """Quantise the weights below an adapter, in place.

    With `base="residual"` those are `W − B₀A₀`, as QPiSSA has it (PiSSA, arXiv 2404.02948, section 4); the layer then starts
    at `Q(W − B₀A₀) + B₀A₀` rather than at `Q(W)`, and `quantization_errors` says which of the two is nearer to `W`. Its adapter is
    loaded on the original weights, and quantises them again. With `base="untouched"` the base is as of
    `load_model(..., quantization=kind)`. The original weights are gone afterwards: `restore` does not bring them back.

    Args:
        kind: "nf4" or "int8".

    Returns:
        `peft_model`.

    Raises:
        CordaError: no adapter, bitsandbytes is not installed, or the base is quantised already.
    """
    if not isinstance(peft_model, PeftModel):
        raise CordaError(
            f"quantize_base takes a model with an adapter (a PeftModel), not a {type(peft_model).__name__}; "
            "load_model(..., quantization=...) quantises a bare one"
        )
    quantize_model(peft_model, kind)
    for config in peft_model.peft_config.values():
        if isinstance(config, PairedConfig) and config.base == "residual":
            config.quantization = kind
    return peft_model
