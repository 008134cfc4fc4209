"""Scaling after training: a model between the one before training and the trained one, or a little beyond.

`W + s (W_trained − W)` of every trained weight: at s = 0 the model before, at 1 the trained one, and in between the
line along which WiSE-FT trades the new task for what was known (Wortsman et al., arXiv 2109.01903). It costs no
training, so every method is compared with itself scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from corda_vlm.adapter.options import check_scale
from corda_vlm.adapter.paired import PairedLayer, base_of
from corda_vlm.errors import CordaError

# PEFT's starts that leave the base weight as it was. The others write a residual into it, so W is gone.
LEAVE_THE_BASE = ("true", "false", "gaussian", "eva", "orthogonal", "mica")


def at_scale(
    model: nn.Module, scale: float, *, base: Mapping[str, Tensor] | nn.Module | None = None
) -> AbstractContextManager[None]:
    """A context in which every trained weight of `model` is `W + scale · (W_trained − W)`, whatever trained it.

    Args:
        model: a `PeftModel` (see `scaled`), or one whose own weights were trained (see `interpolated`).
        scale: from 0, the model before training, over 1, the trained one, up to `MAX_SCALE`.
        base: for a model without an adapter: its weights before training.

    Raises:
        CordaError: a scale that is none, a full fine-tune without the weights before training, or a model of
            which nothing was trained.
    """
    check_scale(scale)
    if isinstance(model, PeftModel) or _has_adapter(model):
        return scaled(model, scale)
    if base is None:
        raise CordaError(
            f"a scale sweep needs the weights before training: this {type(model).__name__} has no adapter, so what "
            "was trained is in its own weights. Pass base=, the state_dict of the model before training or that model"
        )
    return interpolated(model, base, scale)


@contextmanager
def scaled(peft_model: nn.Module, scale: float) -> Iterator[None]:
    """Within the block every adapted weight is `W + scale · ΔW`, with the active adapters' ΔW.

    For our pairs in both base modes, and PEFT's LoRA (rank-stabilised or not), DoRA and further variants. PEFT's own
    scaling of DoRA changes the direction alone and leaves the magnitude trained, so that 0 would not be the original
    model; here it is `W + scale · (W_dora − W)`.

    Scale 0 is the original exactly (a residual base: up to rounding), 1 the trained model exactly.

    Raises:
        CordaError: a scale that is none; a model without an adapter, or with a merged one; an adapter that changed more
            than W + ΔW, which no scale of ΔW undoes.
    """
    check_scale(scale)
    layers = [m for m in peft_model.modules() if isinstance(m, LoraLayer)]
    _check_scalable(peft_model, layers)
    scalings = [dict(layer.scaling) for layer in layers]
    variants = [dict(layer.lora_variant) for layer in layers]
    try:
        for layer in layers if scale != 1.0 else ():
            for name in layer.active_adapters:
                variant = layer.lora_variant.get(name)
                if variant is not None and not isinstance(layer, PairedLayer):
                    layer.lora_variant[name] = _Partly(variant, scale)  # pyright: ignore[reportArgumentType]
                elif name in layer.scaling:
                    layer.scaling[name] *= scale
        yield
    finally:
        for layer, scaling, variant in zip(layers, scalings, variants, strict=True):
            layer.scaling.update(scaling)
            layer.lora_variant.update(variant)


@contextmanager
def interpolated(
    model: nn.Module, base: Mapping[str, Tensor] | nn.Module, scale: float
) -> Iterator[None]:
    """Within the block every parameter and buffer is `base + scale · (trained − base)`; after it, the trained one to the bit.

    Norms, biases and embeddings too, as in WiSE-FT. Running statistics follow up to scale 1 and stay there, as a
    variance may not be extrapolated below 0. Memory: one copy of what training changed.

    Args:
        model: with the trained weights; packed or not as `base` is.
        base: the weights before training under the model's names, or the model before training. What is not among
            them counts as unchanged, unless it requires a gradient.
        scale: see `at_scale`.

    Raises:
        CordaError: a scale that is none; base weights of another model, or without one that was trained; or weights
            of which none was changed.
    """
    check_scale(scale)
    before = base.state_dict() if isinstance(base, nn.Module) else base
    own, buffers = dict(model.named_parameters()), _floating_buffers(model)
    _check_base(model, own, before)
    trained: dict[str, Tensor] = {}
    targets = {**own, **buffers}
    try:
        with torch.no_grad():
            for name, tensor in targets.items():
                start = before.get(name)
                if start is None or torch.equal(start.to(tensor), tensor):
                    continue
                trained[name] = tensor.detach().clone()
                step = min(scale, 1.0) if name in buffers else scale
                tensor.copy_(between(start.to(tensor.device), trained[name], step))
        if not trained:
            raise CordaError(
                f"there is nothing to scale: the weights of this {type(model).__name__} equal those of base, so "
                "nothing was trained. Pass the weights from before training as base"
            )
        yield
    finally:
        with torch.no_grad():
            for name, tensor in trained.items():
                targets[name].copy_(tensor)


def between(
    start: Float[Tensor, "*n"], end: Float[Tensor, "*n"], scale: float
) -> Float[Tensor, "*n"]:
    """`start + scale · (end − start)`, exact at both ends, in float32 or better."""
    if scale in (0.0, 1.0):
        return end if scale else start
    precise = torch.promote_types(end.dtype, torch.float32)
    return torch.lerp(start.to(precise), end.to(precise), scale)


class _Partly:
    """A variant's layer with only a share of its change: `W + scale · (W_variant − W)`.

    A layer is linear in its weight, so its outputs are mixed. The variant runs at its trained scaling, as a DoRA's
    norm has to be the one of the trained direction.
    """

    def __init__(self, variant: LoraVariant, scale: float) -> None:
        self.variant, self.scale = variant, scale

    def forward(
        self,
        module: LoraLayer,
        active_adapter: str,
        x: Float[Tensor, "*read"],
        result: Float[Tensor, "*given"],
        **rest: Any,
    ) -> Float[Tensor, "*given"]:
        if self.scale == 0.0:
            return result
        full = self.variant.forward(module, active_adapter, x, result, **rest)
        return result + self.scale * (full - result)

    def refuse_merging(self, *_: Any, **__: Any) -> Tensor:
        raise CordaError(
            "leave the scaled() block before merging this adapter: its variant merges whole or not at all"
        )

    merge_safe = merge_unsafe = unmerge = refuse_merging


def _has_adapter(model: nn.Module) -> bool:
    return any(isinstance(m, BaseTunerLayer) for m in model.modules())


def _check_scalable(model: nn.Module, layers: Sequence[LoraLayer]) -> None:
    if not layers:
        raise CordaError(
            f"this {type(model).__name__} has no LoRA adapter to scale. For a full fine-tune use at_scale(model, "
            "scale, base=the weights before training)"
        )
    if any(layer.merged for layer in layers):
        raise CordaError("the adapter is merged into the base; call `unmerge_adapter()` first")
    for name, module in base_of(model).named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            raise CordaError(
                f"{name!r} carries a {type(module).__name__}; only LoRA and what is built on it can be scaled"
            )
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise CordaError(
                f"{name!r} was trained beside the adapter (modules_to_save or trainable tokens), and its scale is not "
                "the adapter's; train without it, or take full fine-tuning"
            )
    if not isinstance(model, PeftModel):
        return
    for adapter in model.active_adapters:
        config = model.peft_config[adapter]
        start = getattr(config, "init_lora_weights", True)
        if str(start).lower() not in LEAVE_THE_BASE:
            raise CordaError(
                f"adapter {adapter!r} started with init_lora_weights={start!r}, for which PEFT changes the base weights: "
                "scale 0 would not be the original model. Train it with this package's method, which keeps them"
            )
        if getattr(config, "bias", "none") != "none":
            raise CordaError(
                f"adapter {adapter!r} trained biases of the base (bias={config.bias!r}), which no scale undoes; "  # pyright: ignore[reportAttributeAccessIssue]
                "train it with bias='none'"
            )


def _check_base(model: nn.Module, own: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    # a state_dict also has tied weights under each of their names
    known = {**own, **model.state_dict()}
    for name, tensor in before.items():
        if name not in known:
            raise CordaError(
                f"the weights before training are of another model: this {type(model).__name__} has no {name!r}. "
                "Pass those of the model that training began with"
            )
        if known[name].shape != tensor.shape:
            raise CordaError(
                f"the weights before training are of another model: {name!r} is {tuple(tensor.shape)} there and "
                f"{tuple(known[name].shape)} here"
            )
    for name, parameter in own.items():
        if parameter.requires_grad and name not in before:
            raise CordaError(
                f"a scale sweep needs the weights before training: {name!r} was trained and is not among those given"
            )


def _floating_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the weights: batch norm's running statistics, and not its count of batches."""
    kept = model.state_dict()
    return {n: b for n, b in model.named_buffers() if n in kept and b.is_floating_point()}
