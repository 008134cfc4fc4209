"""Methods without an adapter."""

from __future__ import annotations

from torch import nn

from corda_vlm.adapter.wrapped.wrap import forget_frozen, remember_frozen
from corda_vlm.errors import CordaError
from corda_vlm.methods.method import MethodRequest
from corda_vlm.same_model import is_quantized
from corda_vlm.sites import find_sites


def full(model: nn.Module, request: MethodRequest) -> nn.Module:
    """Every parameter of the chosen towers trainable.

    Raises:
        CordaError: the base is quantised: its matrices cannot be trained, and norms and embeddings alone are not all.
    """
    if is_quantized(model):
        raise CordaError(
            "full fine-tuning trains the matrices of a model, and those of this one are kept in fewer bits, which no step changes: "
            "load it without quantization, or take a method with an adapter, such as lora or corda-kpm"
        )
    prefixes = _tower_prefixes(model, request)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(any(f"{name}.".startswith(prefix) for prefix in prefixes))
    return model


def _tower_prefixes(model: nn.Module, request: MethodRequest) -> list[str]:
    """Dotted prefixes of the chosen towers' parameters; the empty one, which is all, if none or all were chosen.

    A tower is all below the shortest prefix of its sites that no other tower's site shares: what lies beside the towers
    (the embeddings and projection of open_clip's text tower, the logit scale) is trained only with all of them.
    """
    if request.towers is None:
        return [""]
    chosen = {site.name for site in find_sites(model, towers=request.towers)}
    others = [site.name for site in find_sites(model) if site.name not in chosen]
    if not others:
        return [""]
    prefixes = set()
    for name in chosen:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            prefix = ".".join(parts[:length]) + "."
            if not any(other.startswith(prefix) for other in others):
                prefixes.add(prefix)
                break
    return sorted(prefixes)


def cannot_detach(model: nn.Module) -> nn.Module:
    raise CordaError("full fine-tuning keeps nothing of the original weights; load the model again")


def freeze(model: nn.Module, request: MethodRequest) -> nn.Module:
    """Nothing trainable but the head that training puts on top."""
    remember_frozen(model)
    return model.requires_grad_(False)


def unfreeze(model: nn.Module) -> nn.Module:
    forget_frozen(model)
    return model
