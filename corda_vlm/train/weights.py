"""Trained weights on disk: safetensors, nothing that was not trained, and no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor, nn

from corda_vlm.adapter.base import HEADER, absolute, save_base
from corda_vlm.adapter.folder import ADAPTER, TRAINED, WEIGHTS
from corda_vlm.adapter.paired import PairedConfig, base_of
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.files import write_text
from corda_vlm.tensors import add_checksums, load_tensors, save_tensors
from corda_vlm.train.heads import Head

HEAD = "head.safetensors"


_CARD = """# An adapter of corda_vlm

Its layers start from a frozen pair of factors, which plain PEFT does not know. `corda_vlm.load_adapter(model, folder)` puts it
on the model that it was trained on. Tools that load adapters by plain PEFT get it in one of two ways:

- as a plain LoRA, or merged into a whole model: `corda-vlm export MODEL FOLDER NEW_FOLDER --format lora` (or `merged`);
- as it is, where corda_vlm is installed: `import corda_vlm.adapter.paired` before the tool calls `PeftModel.from_pretrained`, which
  then knows the kind. Without that import it stops with `KeyError: 'CORDA_VLM'`.
"""


def save_weights(
    model: nn.Module, head: Head | None, folder: str | Path, *, base: str | None = None
) -> None:
    """Write what was trained into `folder`.

    A `PeftModel` writes its adapter as PEFT does (`adapter_model.safetensors`, `adapter_config.json`). Any
    other model writes `trained.safetensors`: trained parameters and buffers under the model's own names.

    Args:
        base: fingerprint of the model that the training began with, which is noted.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = {} if base is None else {HEADER: base}
    if isinstance(model, PeftModel):
        config = model.peft_config[str(model.active_adapter)]
        config.base_model_name_or_path = absolute(
            config.base_model_name_or_path or base_of(model).__dict__.get("name_or_path")
        )
        # "auto" would ask the hub whether the vocabulary has grown, at every checkpoint.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        add_checksums(folder / ADAPTER, header)
        if isinstance(model.peft_config[str(model.active_adapter)], PairedConfig):
            write_text(folder / "README.md", _CARD)  # in place of PEFT's empty model card
    else:
        save_tensors(folder / TRAINED, _trained(model), header)
    if head is not None:
        head.save(folder / HEAD)
    if base is not None:
        save_base(base, folder)


def load_weights(model: nn.Module, head: Head | None, folder: str | Path) -> None:
    """Put what `save_weights` wrote back into the same model, or one made the same way.

    Raises:
        ForeignFileError: no such files, damaged ones, or those of another model or adapter.
    """
    folder = Path(folder)
    path = folder / (ADAPTER if isinstance(model, PeftModel) else TRAINED)
    whole = folder.parent if folder.name == WEIGHTS else folder
    state = load_tensors(path, "trained weights", f"delete {whole} to train again")
    if isinstance(model, PeftModel):
        _load_adapter(model, state, path)
    else:
        _load_trained(model, state, path)
    if head is not None:
        saved = Head.load(folder / HEAD)
        if saved.kind != head.kind or saved.weight.shape != head.weight.shape:
            raise ForeignFileError(f"{folder / HEAD}: a head of another task")
        head.load_state_dict(saved.state_dict())


def _load_adapter(model: PeftModel, state: dict[str, Tensor], path: Path) -> None:
    try:
        found = set_peft_model_state_dict(model, state, adapter_name=str(model.active_adapter))
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ForeignFileError(f"{path}: an adapter of another model or rank ({error})") from error
    name = f".{model.active_adapter}"
    missing = [key for key in found.missing_keys if "lora_" in key and name in key]
    if found.unexpected_keys or missing:
        strange = [*found.unexpected_keys, *missing][0]
        raise ForeignFileError(f"{path}: an adapter of another model or method, at {strange}")


def _load_trained(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = _trained(model)
    different = sorted(set(own) ^ set(state)) or [n for n in own if own[n].shape != state[n].shape]
    if different:
        raise ForeignFileError(f"{path}: weights of another model, at {different[0]}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters, and the buffers of modules that have some (batch norm's statistics); tied ones once."""
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    found[f"{prefix}.{name}".lstrip(".")] = buffer
    return found


def all_finite(model: nn.Module, head: Head | None) -> bool:
    """Is every trained number finite?"""
    trained = [p for p in model.parameters() if p.requires_grad]
    trained += [] if head is None else list(head.parameters())
    return all(bool(torch.isfinite(p).all()) for p in trained)


_DECIDES = ("peft_type", "base", "freeze_a", "use_dora", "origin")


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def signature(model: nn.Module) -> dict[str, Any]:
    """What a resumption checks the model by: its adapter, its trained parameters' shapes, and how large some frozen
    ones are. Not the adapter's numbers: directions of equal size may turn with the number of threads."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    sampled = frozen[:: max(1, len(frozen) // 8)]
    adapter = model.peft_config[str(model.active_adapter)] if isinstance(model, PeftModel) else None
    return {
        "adapter": {key: _plain(getattr(adapter, key, None)) for key in _DECIDES},
        "trained": {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad},
        "frozen": [float(p.detach().float().abs().mean()) for p in sampled],
    }


def check_signature(saved: dict[str, Any], model: nn.Module, where: Path) -> None:
    """Raises `CordaError` if `model` is not the one whose `signature` was saved."""
    own = signature(model)
    for key, value in own["adapter"].items():
        before = saved.get("adapter", {}).get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            value = {name: value.get(name) for name in before}  # what was noted then
        if before != value:
            raise CordaError(
                f"{where} holds the training of another adapter ({key}: {before} there, {value} now); delete it to begin "
                "anew, or give another output folder"
            )
    if saved["trained"] != own["trained"]:
        names = set(saved["trained"]) ^ set(own["trained"])
        at = sorted(names)[0] if names else "the same names, but other shapes"
        raise CordaError(f"{where} holds the training of another model or method ({at})")
    before, now = torch.tensor(saved["frozen"]), torch.tensor(own["frozen"])
    if before.shape != now.shape or not torch.allclose(before, now, rtol=1e-2, atol=1e-6):
        raise CordaError(f"{where} holds the training of a model with other frozen weights")
