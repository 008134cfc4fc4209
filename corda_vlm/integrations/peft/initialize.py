"""CorDA's start for a model that has its adapter already, beside PEFT's function for EVA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn
from typing_extensions import Unpack

from corda_vlm.adapter.interpolate import LEAVE_THE_BASE
from corda_vlm.adapter.paired import PairedLayer, base_of, trained
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families.base import device_of
from corda_vlm.integrations.peft.layers import fingerprint, refuse_quantized, sites_of, weight_of
from corda_vlm.integrations.peft.starts import StartKeywords, StartOptions, computed
from corda_vlm.integrations.peft.watch import watching
from corda_vlm.progress import showing, track


def forward_mapping(model: nn.Module, inputs: Any) -> object:
    """Run the model on a mapping of its arguments."""
    return model(**inputs)


def initialize_lora_corda_weights(
    model: PeftModel,
    dataloader: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], object] = forward_mapping,
    *,
    corda_method: str | None = None,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
    **options: Unpack[StartKeywords],
) -> None:
    """Start the adapter that a model has as CorDA does: `B₀`, `A₀` into the adapter, `W − B₀A₀` into the base.

    The adapter is one of PEFT's plain LoRA, fresh: made with `init_lora_weights=True` (or False, or "gaussian"), with
    `low_cpu_mem_usage=True` too. Its configuration says `init_lora_weights="corda"` afterwards, as it would by PEFT's own way.

    Args:
        dataloader: calibration batches; moved to the model's device here. Padding does not count, see `preprocess_corda`.
        forward_fn: runs the model on one of them.
        corda_method: "kpm" or "ipm"; None takes that of the adapter's `corda_config`, or "kpm" if it has none.
        options: as of `preprocess_corda`.

    Raises:
        CordaError: no such model or adapter, or one that has changed the base already; what `preprocess_corda` raises.
    """
    layers = _fresh_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]
    method = corda_method or getattr(config.corda_config, "corda_method", "kpm")
    asked = StartOptions.of(method, options)
    bare = base_of(model)
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    with showing(show_progress_bar), model.disable_adapter():
        sites = sites_of(bare, bases)
        with watching(bare, bases, sites, asked.precision, called=model) as watch:
            for batch in track(dataloader, "calibrate", unit="batch"):
                forward_fn(model, _moved(batch, device_of(bare)))
        ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
        pairs = computed(bases, watch.store(fingerprint(bare)), ranks, asked)
    for name, (B, A) in pairs.items():
        _start(layers[name], adapter_name, B, A)
    config.init_lora_weights, config.corda_config = "corda", CordaConfig(corda_method=method)  # pyright: ignore[reportArgumentType]


def _fresh_layers(model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """The layers of a plain LoRA that has left the base alone so far."""
    if not isinstance(model, PeftModel):
        raise CordaError(
            f"initialize_lora_corda_weights takes a model with an adapter of PEFT, not a {type(model).__name__}; for a bare one "
            "take preprocess_corda, then get_peft_model"
        )
    if adapter_name not in model.peft_config:
        raise UnknownNameError("adapter", adapter_name, model.peft_config)
    if len(model.peft_config) > 1:
        raise CordaError(
            f"the model has {len(model.peft_config)} adapters, and CorDA puts a residual in place of the weights that all of them "
            "are on; start with one, or take corda_vlm.adapt, which leaves the weights alone"
        )
    start = str(getattr(model.peft_config[adapter_name], "init_lora_weights", None)).lower()
    if start not in LEAVE_THE_BASE:
        raise CordaError(
            f"the adapter was made with init_lora_weights={start!r}; make it with init_lora_weights=True"
        )
    layers = {
        name: module
        for name, module in base_of(model).named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }
    for name, layer in layers.items():
        if isinstance(layer, PairedLayer) or layer.lora_variant.get(adapter_name) is not None:
            raise CordaError(f"the adapter of {name!r} is no plain LoRA, which CorDA starts")
        if isinstance(layer.get_base_layer(), nn.Conv2d):
            raise CordaError(
                f"{name!r} is a convolution, for which PEFT has no start of CorDA; leave it out of target_modules, or take "
                "corda_vlm.adapt, which has"
            )
        if layer.merged:
            raise CordaError("the adapter is merged into the base; call unmerge_adapter() first")
        refuse_quantized(name, layer.get_base_layer())
    return layers


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


@torch.no_grad()
def _start(layer: LoraLayer, name: str, B: Tensor, A: Tensor) -> None:
    """The pair into the adapter, its scaling taken out of both alike, and what it stands for out of the weight."""
    root = layer.scaling[name] ** 0.5
    for module, value in ((layer.lora_B[name], B / root), (layer.lora_A[name], A / root)):
        assert isinstance(module, nn.Linear)
        parameter = module.weight
        if parameter.is_meta:
            value = value.to(weight_of(layer.get_base_layer()).device)
            module.weight = nn.Parameter(value.contiguous(), parameter.requires_grad)
        else:
            parameter.copy_(value)
    started_B, started_A = trained(layer, name)
    weight = weight_of(layer.get_base_layer())
    weight.copy_(weight.double() - layer.scaling[name] * started_B.double() @ started_A.double())
