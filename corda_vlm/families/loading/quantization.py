"""A model whose layers keep their weights in four or eight bits: how transformers is asked to load one, and one made in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from corda_vlm.errors import CordaError
from corda_vlm.extras import require
from corda_vlm.families.base import unwrap
from corda_vlm.families.layers.conv1d import is_conv1d
from corda_vlm.families.layers.experts import is_stack
from corda_vlm.families.layers.packed import is_packed
from corda_vlm.families.layers.quantized import (
    BLOCK,
    is_misread,
    plain_layer,
    quantize_layer,
    storage_of,
)
from corda_vlm.names import quoted

logger = logging.getLogger(__name__)

_SAID_AT_EVERY_CALL = "bitsandbytes.autograd._functions"


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """transformers' configuration for "nf4", with its scales quantised too as QLoRA has it, or "int8".

    Raises:
        CordaError: bitsandbytes is not installed.
    """
    require("bitsandbytes", "quantized", f"quantization={kind!r}")
    import transformers

    if kind == "int8":
        quiet_int8()
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quiet_int8() -> None:
    """bitsandbytes says at every call of every layer that eight-bit products take float16."""
    logging.getLogger(_SAID_AT_EVERY_CALL).setLevel(logging.ERROR)


def quantize_model(model: nn.Module, kind: str) -> nn.Module:
    """Keep the weights of a model in "nf4" or "int8" from now on, in place, as transformers does while it loads one.

    All `nn.Linear` layers but the output layer of a language model, those that an adapter wraps included: with an adapter in
    residual mode it is `W − B₀A₀` that is quantised, and the pair stays as it is (QPiSSA, arXiv 2404.02948, section 4).
    Parts of packed attention (open_clip's), experts that share one parameter, Conv1D and modules that are trained whole stay as they
    are, and on a CPU the layers that bitsandbytes would read wrongly there (`is_misread`); a log line says which linear ones.

    Returns:
        `model`.

    Raises:
        CordaError: bitsandbytes is not installed, a layer is quantised already, or none is left to be quantised.
    """
    if kind not in ("nf4", "int8"):
        raise CordaError(f"a model is quantised to nf4 or int8; got {kind!r}")
    require("bitsandbytes", "quantized", "Quantising a model")
    if kind == "int8":
        quiet_int8()
    bare = unwrap(model)
    made, left = 0, []
    parts = _parts_of_packed(bare)
    for parent, key, path, layer in _linears(bare):
        if (storage := storage_of(layer)) is not None:
            raise CordaError(f"{path} is stored as {storage} already; load the original model")
        if _stays(path, layer, kind, parts):
            left.append(path)
            continue
        parent._modules[key] = quantize_layer(layer, kind)
        made += 1
    if not made:
        raise CordaError(
            f"{type(bare).__name__} has no nn.Linear that can be quantised; those of models of transformers are"
        )
    if left:
        logger.info("%d layers keep their weights as they are: %s", len(left), quoted(left))
    if (config := getattr(bare, "config", None)) is not None:
        config.quantization_config = quantization_config(kind, _dtype_of(bare))
        setattr(bare, f"is_loaded_in_{4 if kind == 'nf4' else 8}bit", True)
    return model


def quantizable(model: nn.Module, kind: str) -> frozenset[str]:
    """Names of the layers of a bare model that are kept in fewer bits once it is quantised: all that `quantize_model` quantises,
    and GPT-2's Conv1D, which transformers does."""
    bare = unwrap(model)
    parts = _parts_of_packed(bare)
    linear = {path for _, _, path, layer in _linears(bare) if not _stays(path, layer, kind, parts)}
    return frozenset(linear | {name for name, layer in bare.named_modules() if is_conv1d(layer)})


def warn_of_experts(model: nn.Module) -> None:
    """Say how much of a quantised mixture is in sixteen bits still, as bitsandbytes quantises layers, and experts are none."""
    stacks = [module for module in model.modules() if is_stack(module)]
    if stacks and any(storage_of(module) is not None for module in model.modules()):
        size = sum(p.numel() * p.element_size() for stack in stacks for p in stack.parameters())
        logger.warning(
            "the experts of %d layers share a parameter each, which bitsandbytes does not quantise: they take %.1f GB as before",
            len(stacks),
            size / 1e9,
        )


def warn_of_misread(model: nn.Module) -> None:
    """Say which layers of a model that transformers has quantised do not compute what they should."""
    wrong = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and is_misread(layer, storage_of(layer))
    ]
    if wrong:
        logger.warning(
            "bitsandbytes reads %d layers of four bits wrongly on a CPU, as their inputs are no multiple of %d: %s. Load the model "
            "on a GPU, or in int8",
            len(wrong),
            BLOCK,
            quoted(wrong),
        )


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Keep the weights as matrices again, in place, in the dtype of the parameters that are such (or `dtype`); returns `model`.

    What quantisation has rounded off stays lost. GPT-2's `Conv1D` come back as `attention.unpack` shows them, until `pack`.
    """
    dtype = dtype or _dtype_of(model)
    for module in list(model.modules()):
        for key, child in list(module._modules.items()):
            if isinstance(child, nn.Linear) and storage_of(child) is not None:
                module._modules[key] = plain_layer(child, dtype)
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    for bits in (4, 8):
        model.__dict__.pop(f"is_loaded_in_{bits}bit", None)
    return model


def _linears(bare: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Linear]]:
    """(parent, key, path, layer) of the linear layers but those of an adapter and the one that gives the logits."""
    output: Any = getattr(bare, "get_output_embeddings", lambda: None)()
    if hasattr(output, "get_base_layer"):  # it carries an adapter
        output = output.get_base_layer()
    for name, module in list(bare.named_modules()):
        for key, child in list(module._modules.items()):
            if isinstance(child, nn.Linear) and child is not output and not _is_of_adapter(name):
                yield module, key, f"{name}.{key}" if name else key, child


def _parts_of_packed(bare: nn.Module) -> tuple[str, ...]:
    """Beginnings of the paths of what is part of packed attention or of a stack, packed or not."""
    return tuple(
        f"{name}."
        for name, module in bare.named_modules()
        if is_packed(module) or "packed" in module.__dict__
    )


def _stays(path: str, layer: nn.Linear, kind: str, parts: tuple[str, ...]) -> bool:
    """Does a linear layer keep its weight as it is? Somebody's subclass may read it otherwise than it is called."""
    is_plain = type(layer) is nn.Linear and not path.startswith(parts)
    return not is_plain or _is_whole(path) or is_misread(layer, kind)


def _is_of_adapter(path: str) -> bool:
    """The A and B of PEFT's layers are `nn.Linear`s too."""
    return path.rpartition(".")[2] in ("lora_A", "lora_B")


def _is_whole(path: str) -> bool:
    return any(key in ("modules_to_save", "original_module") for key in path.split("."))


def _dtype_of(model: nn.Module) -> torch.dtype:
    """That of a norm or an embedding: what is no matrix of codes, and no adapter's."""
    plain = (
        p.dtype for n, p in model.named_parameters() if p.is_floating_point() and "lora_" not in n
    )
    return next(plain, torch.float32)
