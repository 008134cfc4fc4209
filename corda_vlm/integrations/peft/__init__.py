"""PEFT's CorDA with this package's moments and decomposition: change one import of a script that you have.

    from corda_vlm.integrations.peft import preprocess_corda  # was: from peft.tuners.lora.corda

    config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"), target_modules=[...])
    preprocess_corda(model, config, run_model=lambda: [model(**batch) for batch in batches])
    model = get_peft_model(model, config)

`initialize_lora_corda_weights(peft_model, batches)` does the same to a model that has its adapter already, as PEFT's
`initialize_lora_eva_weights` does for EVA.

It takes any model and any `target_modules`: no family has to know it. The adapter is PEFT's own, over the residual weight
`W − B₀A₀`. Where the original weight is to stay, several adapters are to be attached, or an anchor is to hold them, take
`corda_vlm.adapt`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.integrations.peft.initialize import initialize_lora_corda_weights
    from corda_vlm.integrations.peft.preprocess import preprocess_corda

_HOMES = {
    "initialize_lora_corda_weights": "initialize",
    "preprocess_corda": "preprocess",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
