"""ms-swift with a tuner of ours, in its `tuners_map`: the base stays untouched, and checkpoints are ours (rank r, not 2r).

    corda-vlm calibrate MODEL "{source: jsonl:nq_open_dev_3610.jsonl, format: qa}" --samples 256
    corda-vlm plan MODEL --covariance covariance.safetensors --mode kpm --a-norm 10 --rank 16
    CORDA_PLAN=plan.json swift sft configs/integrations/swift.yaml --model MODEL --dataset DATA \\
        --external_plugins configs/integrations/swift_plugin.py --tuner_type corda

The plan is made of the model in the precision that it is trained in: `--torch_dtype` here is `--dtype` there.

Versions: ms-swift 4.6.0 pins PEFT below 0.21, with which this tuner trains but is not saved ("Unknown PEFT type"); it takes PEFT 0.21,
against the pin (`pip install --no-deps "peft>=0.21" corda-vlm jaxtyping wadler-lindig`). It has not been run to its end so.

Expect: the first loss is that of the model itself; `--resume_from_checkpoint` goes on. `corda_vlm.load_adapter(model, checkpoint)` loads
a checkpoint, and `corda-vlm export` writes it for PEFT and vLLM.
"""

from __future__ import annotations

import os
from typing import Any

from swift.tuner_plugin import (  # pyright: ignore[reportMissingImports]
    PeftTuner,
    tuners_map,
)

from corda_vlm import AdapterPlan, attach_adapter, load_adapter


class CordaTuner(PeftTuner):
    """Attaches the plan that CORDA_PLAN names; saved as PEFT saves."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        return attach_adapter(model, AdapterPlan.load(os.environ["CORDA_PLAN"], model=model))

    @staticmethod
    def from_pretrained(model: Any, model_id: str, **kwargs: Any) -> Any:
        known = {name: kwargs[name] for name in ("is_trainable", "adapter_name") if name in kwargs}
        return load_adapter(model, model_id, **known)


tuners_map["corda"] = CordaTuner
