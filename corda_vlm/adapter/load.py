"""Load what was trained, on the original model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from corda_vlm.adapter.base import check_base, check_fingerprint
from corda_vlm.adapter.folder import (
    ADAPTER,
    AGAIN,
    CONFIG,
    check_ranks,
    read_config,
    weights_folder,
)
from corda_vlm.adapter.paired import (
    PairedType,
    base_of,
    paired_layers,
    refuse_residual_of_quantized,
    refuse_second_residual,
    trained,
)
from corda_vlm.adapter.quantized_base import quantize_base
from corda_vlm.adapter.wrapped.wrap import base_modes, wrapping
from corda_vlm.errors import CordaError, ForeignFileError, first_line
from corda_vlm.files import shown
from corda_vlm.same_model import is_quantized
from corda_vlm.tensors import load_tensors


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    is_trainable: bool = False,
    adapter_name: str = "default",
) -> PeftModel:
    """Reload what a training or `save_pretrained` (or a Trainer's checkpoint) wrote, on the *original* base model.

    Takes checkpoints of ours in both base modes, and those of PEFT's own LoRA and DoRA on an unpacked model.

    Args:
        model: the original bare model, in a new process too; or a `PeftModel` of ours, for a further adapter.
        directory: the folder of a training, its `weights/`, a checkpoint, or any folder with an adapter as PEFT saves it.
        is_trainable: leave A and B trainable.

    Raises:
        ForeignFileError: no adapter there, corrupt or truncated, or of another model; the message says which.
    """
    folder = weights_folder(directory)
    config = read_config(folder)
    weights = folder / ADAPTER
    shapes = {
        name: tuple(t.shape) for name, t in load_tensors(weights, "adapter weights", AGAIN).items()
    }
    check_ranks(config, shapes, folder)
    if is_quantized(model):
        refuse_residual_of_quantized(config.get("base", "untouched"))
    if config["peft_type"] == PairedType.CORDA_VLM.value:
        if isinstance(model, PeftModel):
            refuse_second_residual([*base_modes(model), config.get("base", "untouched")])
        check_fingerprint(config.get("origin", {}).get("model_fingerprint"), model, folder)
    check_base(model, folder, weights, config)
    with wrapping(model), _fitting(model, folder, adapter_name):
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
            peft_model = model
        else:
            peft_model = PeftModel.from_pretrained(
                model, str(folder), adapter_name=adapter_name, is_trainable=is_trainable
            )
        expected = set(get_peft_model_state_dict(peft_model, adapter_name=adapter_name))
        if expected != set(shapes):
            odd = sorted(expected ^ set(shapes))
            raise ForeignFileError(
                f"{folder} does not fit this model: {odd[0]} is only in the "
                f"{'file' if odd[0] in shapes else 'model'} ({len(odd)} such tensors)"
            )
        _check_pairs(peft_model, adapter_name, folder)
    if (kind := config.get("quantization")) is not None:
        quantize_base(peft_model, kind)
    return peft_model


@contextmanager
def _fitting(model: nn.Module, folder: Path, adapter_name: str) -> Iterator[None]:
    """Turn what PEFT raises over an adapter that does not fit into a `ForeignFileError`, and take its pieces back."""
    before = set(model.peft_config) if isinstance(model, PeftModel) else set()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # raised by us
            yield
    except Exception as error:
        if isinstance(model, PeftModel) and adapter_name in set(model.peft_config) - before:
            with suppress(Exception):  # the first error is the one to tell
                model.delete_adapter(adapter_name)
        if isinstance(error, (CordaError, torch.OutOfMemoryError, MemoryError)):
            raise
        raise ForeignFileError(
            f"the adapter in {folder} does not fit this {type(base_of(model)).__name__}, or its {CONFIG} is damaged "
            f"({type(error).__name__}: {shown(first_line(error))}). Load the model it was trained on, or train again."
        ) from error


def _check_pairs(peft_model: PeftModel, adapter_name: str, folder: Path) -> None:
    """Raise unless each layer of ours does what its training did, whatever the configuration says."""
    for name, layer in paired_layers(peft_model).items():
        if adapter_name not in layer.scaling:
            continue
        if layer.scaling[adapter_name] != 1:
            raise ForeignFileError(
                f"{folder / CONFIG} scales the adapter of {name!r} by {layer.scaling[adapter_name]:g}, where it was trained "
                "at 1: the file was changed. Set lora_alpha to r, or train again."
            )
        _, A = trained(layer, adapter_name)
        if layer.a_is_frozen(adapter_name) and not torch.equal(
            A, layer.pair(adapter_name)[1].to(A)
        ):
            raise ForeignFileError(
                f"{folder / CONFIG} says that A was frozen, and that of {name!r} was trained: the file was changed. Set "
                "freeze_a to false, or train again."
            )
