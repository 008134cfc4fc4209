"""Which layers of a model a `LoraConfig` of PEFT means, with which ranks, and what they are to us."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from corda_vlm.errors import CordaError, NoSitesError
from corda_vlm.families import Family, any_family
from corda_vlm.families.generic import GENERIC
from corda_vlm.families.layers.attention import is_packed
from corda_vlm.families.layers.conv1d import is_conv1d
from corda_vlm.families.layers.matrix import matrix_of
from corda_vlm.families.layers.quantized import storage_of
from corda_vlm.plan.checks import check_rank
from corda_vlm.sites import Site, model_fingerprint, site_of


def target_layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Name -> layer, of those that PEFT would adapt by CorDA: `nn.Linear` and `Conv1D`.

    Raises:
        NoSitesError: there is none.
        CordaError: one is a part of packed attention, or its weight is quantized or not in memory.
    """
    resolved = _resolved(model, config)
    layers = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module))
        and LoraModel._check_target_module_exists(resolved, name)
    }
    if not layers:
        raise NoSitesError(
            f"target_modules={resolved.target_modules!r} are no nn.Linear or Conv1D of this {type(model).__name__}; "
            "PEFT matches names by their ends, and a text as a regular expression of the whole name"
        )
    packed = [name for name, module in model.named_modules() if is_packed(module)]
    for name, layer in layers.items():
        if any(name.startswith(f"{parent}.") for parent in packed):
            raise CordaError(
                f"{name!r} is a part of nn.MultiheadAttention, which plain PEFT cannot adapt; leave it out of target_modules, "
                "or take corda_vlm.adapt, which can"
            )
        if weight_of(layer).is_meta:
            raise CordaError(
                f"the weight of {name!r} is not in memory (on the device 'meta'); load the model without offloading to the disk"
            )
        refuse_quantized(name, layer)
    return layers


def refuse_quantized(name: str, layer: nn.Module) -> None:
    """Raise a `CordaError` for a weight that cannot take what PEFT's CorDA writes into it."""
    kind = storage_of(layer)
    if kind is not None or not weight_of(layer).is_floating_point():
        raise CordaError(
            f"the weight of {name!r} is of {kind or weight_of(layer).dtype}: it is quantized. Load the model in float32, float16 or "
            "bfloat16, and quantize the residual afterwards; or take corda_vlm.adapt, which leaves a quantized base as it is"
        )


def _resolved(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The configuration with the targets that `get_peft_model` would fill in."""
    resolved = copy(config)
    if resolved.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(str(kind))
        if targets is None:
            raise CordaError(
                f"PEFT has no target_modules of its own for this {type(model).__name__}; name them in the LoraConfig"
            )
        resolved.target_modules = {*targets} if isinstance(targets, list) else targets  # pyright: ignore[reportAttributeAccessIssue] # a set, as PEFT makes it
    return _maybe_include_all_linear_layers(resolved, model)  # pyright: ignore[reportReturnType]


def ranks_of(layers: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, int]:
    """Name -> rank, by `r` and `rank_pattern`.

    Raises:
        CordaError: a rank that the layer's weight cannot have; names it.
    """
    patterns = config.rank_pattern or {}
    ranks = {name: patterns.get(get_pattern_key([*patterns], name), config.r) for name in layers}
    for name, rank in ranks.items():
        out, inp = weight_of(layers[name]).shape
        check_rank({name: (out, inp)}, rank)
    return ranks


def weight_of(layer: nn.Module) -> Float[Tensor, "out inp"]:
    """The weight of an `nn.Linear` or `Conv1D` as a matrix that multiplies tokens; shares its storage."""
    matrix = matrix_of(layer)
    assert matrix is not None  # see `target_layers`
    return matrix.read()


def family_or_generic(model: nn.Module) -> Family:
    """What is known of the model; one that its family refuses to adapt is taken as any other."""
    try:
        return any_family(model)
    except CordaError:
        return GENERIC


def sites_of(model: nn.Module, names: Mapping[str, nn.Module]) -> list[Site]:
    """The layers as sites: with tower and stream as far as the model's family knows them, else each with its own."""
    family = family_or_generic(model)
    return [site_of(family, model, name) or _own(model, name) for name in names]


def _own(model: nn.Module, name: str) -> Site:
    site = site_of(GENERIC, model, name)
    assert site is not None  # its last rule is like every name
    return site


def fingerprint(model: nn.Module) -> str:
    """`model_fingerprint`, of any model that has a linear layer."""
    return model_fingerprint(model, family_or_generic(model))
