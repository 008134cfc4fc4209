"""Attach a plan to a model with PEFT as the carrier.

What a model shows while an adapter is attached, by base mode (see `corda_vlm.adapter.paired`):

|                          | "untouched"             | "residual"                    |
|--------------------------|-------------------------|-------------------------------|
| at the start             | the original, exactly   | the original, up to rounding  |
| `disable_adapter()`      | the original, exactly   | the residual `W₀ = W − B₀A₀`  |
| `restore`, `unload()`    | the original, exactly   | the original, up to rounding  |
| several adapters         | yes                     | no, refused                   |

A plan of "qera" or "loftq" is a plain LoRA instead: its pair is added to a quantised base, so that the start is nearer to the original
than the base is.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from typing_extensions import Unpack

from corda_vlm.adapter.base import absolute
from corda_vlm.adapter.options import AttachKeywords, AttachOptions
from corda_vlm.adapter.paired import (
    PairedConfig,
    PairedLayer,
    keep_a_frozen,
    refuse_residual_of_quantized,
    refuse_second_residual,
    start_from,
)
from corda_vlm.adapter.wrapped.carriers import Carrier, carriers
from corda_vlm.adapter.wrapped.full_modules import check_full_modules
from corda_vlm.adapter.wrapped.targets import check_wrapped, lora_targets, unlike_in_peft
from corda_vlm.adapter.wrapped.wrap import base_modes, wrapping
from corda_vlm.decompose import Decomposition
from corda_vlm.errors import CordaError
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.layers.quantized import storage_of
from corda_vlm.options import options_from
from corda_vlm.plan import AdapterPlan
from corda_vlm.same_model import is_quantized
from corda_vlm.sites import get_layer, model_fingerprint, site_slices

# What an adapter's configuration says of the plan it came from.
_ORIGIN = (
    "method",
    "mode",
    "family",
    "model_fingerprint",
    "data_fingerprint",
    "task_fingerprint",
    "rank",
    "damping",
    "a_norm",
    "beta",
)


def attach_adapter(
    model: nn.Module,
    plan: AdapterPlan,
    *,
    adapter_name: str = "default",
    **options: Unpack[AttachKeywords],
) -> PeftModel:
    """Attach the planned adapter. The model's outputs stay the same; only A, B and `modules_to_save` are trainable.

    `model` itself is changed: packed attention stays unpacked, and the planned layers wrapped, until `restore`.

    Args:
        model: the bare model the plan was made for, or a `PeftModel` of ours, which then gets a further adapter.
        adapter_name: PEFT's name for it.
        options: of `AttachOptions`. The table above compares the two choices of `base`. Of `modules_to_save` copies are
            trained; the originals return with `restore`.

    Raises:
        ForeignFileError: the plan was made for another model or family; both are named.
        UnknownNameError: unknown base mode.
        CordaError: what PEFT wrapped is not what was planned; a residual of a base that is quantised already.
    """
    asked = options_from(AttachOptions, options, "attach_adapter")
    if isinstance(model, PeftModel):  # first: a residual base has another fingerprint
        refuse_second_residual([*base_modes(model), asked.base])
    plan.check(model)
    if missing := [s.site.name for s in plan.sites if s.site.name not in plan.factors]:
        raise CordaError(f"the plan has no factors for {missing[0]!r}; make it with plan_adapter")
    if asked.freeze_a:
        _warn_blind_basis(plan)
    ranks = {s.site.name: s.rank for s in plan.sites}
    config = _config(model, plan, asked, ranks)
    with wrapping(model):
        peft_model = _with_adapter(model, config, adapter_name)
        config.base_model_name_or_path = absolute(config.base_model_name_or_path)
        check_wrapped(peft_model, ranks, adapter_name)
        for carrier in carriers(peft_model, adapter_name):
            _fill(carrier, adapter_name, plan.factors, asked.freeze_a)
    return peft_model


def _config(
    model: nn.Module, plan: AdapterPlan, asked: AttachOptions, ranks: Mapping[str, int]
) -> LoraConfig:
    """PEFT's own LoRA where every B starts at zero, so that every tool knows what it loads; else that of our pair."""
    if plan.corrects:
        _check_corrected(model, plan)
    # beside an adapter of ours PEFT wants another of its kind, and some convolutions it takes for others
    plain = plan.corrects or (
        plan.starts_at_zero
        and not isinstance(model, PeftModel)
        and not unlike_in_peft(model, ranks)
    )
    given = {
        **lora_targets(ranks, slices=site_slices(model), plain=plain),
        "init_lora_weights": False,  # the factors are copied in
        "modules_to_save": check_full_modules(model, asked.modules_to_save, ranks) or None,
    }
    origin = {name: getattr(plan, name) for name in _ORIGIN}
    if is_quantized(model):
        refuse_residual_of_quantized(asked.base)
        # what it is trained on, and belongs on: the plan may be of the original
        origin["model_fingerprint"] = model_fingerprint(model)
    if plain:
        config = LoraConfig(**given)
        config.origin = origin  # pyright: ignore[reportAttributeAccessIssue] # for who trains it: no field, so no file has it
        return config
    return PairedConfig(**given, base=asked.base, freeze_a=asked.freeze_a, origin=origin)


def _check_corrected(model: nn.Module, plan: AdapterPlan) -> None:
    """Raise unless the weights that the plan's pairs are for are rounded as they take back, and carry nothing yet."""
    has = "carries an adapter" if isinstance(model, PeftModel) else _not_rounded(model, plan)
    if has is not None:
        raise CordaError(
            f"the plan's method {plan.method!r} takes back what quantising to {plan.quantize_to} takes off the weights, and this "
            f"model {has}: attach it to load_model(..., quantization={plan.quantize_to!r}), or to the original model after "
            f"quantize_model(model, {plan.quantize_to!r})"
        )


def _not_rounded(model: nn.Module, plan: AdapterPlan) -> str | None:
    """What the first layer has instead that should be rounded; a pair of product zero takes nothing back."""
    corrected = [s.site.name for s in plan.sites if plan.factors[s.site.name].B.any()]
    with unpacked(model):
        kinds = ((name, storage_of(get_layer(model, name))) for name in corrected)
        return next(
            (f"has {k or 'a matrix'} in {name}" for name, k in kinds if k != plan.quantize_to), None
        )


def _with_adapter(model: nn.Module, config: LoraConfig, adapter_name: str) -> PeftModel:
    """The bare model wrapped by PEFT, or the `PeftModel` with one adapter more."""
    if not isinstance(model, PeftModel):
        peft_model = get_peft_model(model, config, adapter_name)
        assert isinstance(peft_model, PeftModel)
        return peft_model
    if adapter_name in model.peft_config:
        raise CordaError(
            f"the model carries an adapter named {adapter_name!r} already; restore(model) first, or give this one "
            "another adapter_name"
        )
    model.add_adapter(adapter_name, config)
    return model


def _fill(
    carrier: Carrier, adapter_name: str, factors: Mapping[str, Decomposition], freeze_a: bool
) -> None:
    """Copy a planned pair into a wrapped layer, as where training starts, and into one of ours as the frozen pair too."""
    layer = carrier.layer
    start = carrier.joined([(factors[site].B, factors[site].A) for site in carrier.sites])
    if isinstance(layer, PairedLayer):
        layer.set_pair(adapter_name, *start)
        start = layer.pair(adapter_name)
    elif freeze_a:
        keep_a_frozen(layer, adapter_name)
    start_from(layer, adapter_name, *start)


def _warn_blind_basis(plan: AdapterPlan) -> None:
    wide = [s for s in plan.sites if s.side == "output" and s.shape[1] > s.shape[0]]
    if wide:
        warnings.warn(
            f"freeze_a bounds the damage by how little A sees of the knowledge, but the output-side basis of "
            f"{plan.method!r} cannot reach the inputs' null space where a layer has more inputs than outputs: "
            f"{len(wide)} sites, first {wide[0].site.name!r} ({wide[0].shape[0]}×{wide[0].shape[1]}). Leave them out "
            "with roles=, or take the input side there: side='auto' with corda, or lora-null.",
            stacklevel=3,
        )
