"""Folders: of trained weights, of a whole model in the format of its own library, and one that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.families import any_family
from corda_vlm.families.loading import convert
from corda_vlm.families.loading.hub import without_bars
from corda_vlm.families.options import Quantization
from corda_vlm.files import (
    asset,
    atomic_folder,
    check_path,
    entries,
    read_json,
    replaced_folder,
    shown,
)
from corda_vlm.locks import locked
from corda_vlm.options import Count, fitted
from corda_vlm.tensors import add_checksums_in, save_tensors

REPORT = "corda_export.json"  # marks a folder as ours, so that a later export may replace it


START = "corda_init"
"""Where the initial pair is in a residual export of `layout="peft"`, beside PEFT's `pissa_init`."""
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TRAINED = "trained.safetensors"
STATE = "model.safetensors"
"""The weights of a merged model that neither transformers nor open_clip loads."""
WEIGHTS = "weights"
"""Where in its folder a training writes what it has trained."""

AGAIN = "save it again, or train again"


def weights_folder(directory: str | Path) -> Path:
    """The folder of the weights themselves: of a training's folder its `weights/`, any other as it is.

    Raises:
        ForeignFileError: a name that no folder can have, or a training that has not come to its end.
    """
    folder = Path(directory)
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return folder  # what was expected in it is told by who looks for it
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ForeignFileError(f"{shown(folder)} cannot be looked into: {reason}") from error
    if any((folder / name).is_file() for name in (ADAPTER, CONFIG, TRAINED)):
        return folder
    if (folder / WEIGHTS).is_dir():
        return folder / WEIGHTS
    begun = sorted(path.name for path in folder.glob("checkpoint-*"))
    if begun:
        raise ForeignFileError(
            f"{shown(folder)} holds a training that is not finished: run the same command again, or give one of its "
            f"checkpoints, {shown(folder / begun[-1])}"
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, of a kind that is loaded here, with what decides about the adapter's strength.

    Raises:
        ForeignFileError: no adapter there, or a damaged one; the message says which.
    """
    if (folder / TRAINED).is_file() and not (folder / CONFIG).is_file():
        raise ForeignFileError(
            f"{shown(folder)} holds a model that was trained in full, and no adapter; corda_vlm.train.trained.load_trained "
            "(evaluate --adapter) loads it"
        )
    path = folder / CONFIG
    config = read_json(path, "adapter")
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise ForeignFileError(
            f"{shown(folder)} holds an adapter of type {shown(repr(kind))}; this loads {' and '.join(map(repr, KINDS))}. "
            "Load others with peft.PeftModel.from_pretrained."
        )
    for name, kind in _FIELDS.items():
        try:
            fitted(config.get(name), kind, name)
        except CordaError:
            value = repr(config[name]) if name in config else "missing"
            raise ForeignFileError(
                f"{shown(path)} is damaged: {name} is {shown(value)}; {AGAIN}"
            ) from None
    if (
        config.get("megatron_config") is not None
    ):  # peft would import the module that megatron_core names
        raise ForeignFileError(
            f"{shown(path)} asks for Megatron's layers, which are not loaded here; set megatron_config to null"
        )
    return config


def check_ranks(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raise `ForeignFileError` where the ranks are out of all proportion to the weights, before memory is taken for them."""
    largest = max((size for shape in shapes.values() for size in shape), default=1)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if rank > max(4 * largest, 1024):
        raise ForeignFileError(
            f"{shown(folder / CONFIG)} is damaged: it says rank {rank}, and no weight beside it is larger than {largest}; {AGAIN}"
        )


KINDS = ("CORDA_VLM", "LORA")


_FIELDS: dict[str, Any] = {
    "r": Count,
    "lora_alpha": float,
    "target_modules": list[str] | str | None,
    "rank_pattern": dict[str, Count] | None,
    "alpha_pattern": dict[str, float] | None,
    "modules_to_save": list[str] | str | None,
    "base_model_name_or_path": str | None,
    "origin": dict[str, Any] | None,
    "freeze_a": bool | None,
    "quantization": Quantization | None,
}
"""What of an adapter's configuration is read here, and of which type it has to be."""


def is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained") and hasattr(model, "config")


def save_model(model: nn.Module, folder: Path, source: str | Path | None) -> str:
    """Write a bare, packed model as its own library loads it, with the processor's files that lie in `source`.

    Returns:
        how a program loads it, the folder being HERE.
    """
    folder.mkdir(exist_ok=True)
    if is_transformers(model):
        with without_bars():
            model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        add_checksums_in(folder)
        _copy_beside(source or getattr(model, "name_or_path", None), folder)
        return f"transformers.{type(model).__name__}.from_pretrained(HERE)"
    if (save := any_family(model).save) is None:
        save_tensors(folder / STATE, model.state_dict())
        return f"model.load_state_dict(safetensors.torch.load_file('HERE/{STATE}'))"
    load = save(model, folder, source)
    _copy_beside(source, folder)
    return load


def located(source: str | Path | None) -> str | Path | None:
    """The folder of a built-in model; anything else as it is."""
    if not source or Path(source).is_dir():
        return source
    try:
        return asset(Path("model_zoo") / source)
    except CordaError:
        return source


def save_converted(model: nn.Module, folder: Path) -> None:
    """As transformers' `CLIPModel`; with a tokenizer if the model uses open_clip's own vocabulary."""
    try:
        convert.save_hf(model, folder)
    except CordaError:
        convert.save_hf(model, folder, tokenizer=False)


def _copy_beside(source: str | Path | None, folder: Path) -> None:
    """Copy the tokenizer's and image processor's files that lie in `source`, if that is a folder."""
    if (
        not source or not Path(source).is_dir()
    ):  # transformers' name_or_path may be "", which is the folder we are in
        return
    for name in (
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "tokenizer.model",
        "added_tokens.json",
    ):
        if (Path(source) / name).is_file() and not (folder / name).exists():
            shutil.copyfile(Path(source) / name, folder / name)


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A temporary folder beside `directory` that takes its place when the block ends well, and else is removed.

    Raises:
        CordaError: `directory` holds something that is no export of ours, or writing failed.
    """
    directory = check_path(directory)
    with locked(directory):
        # Also what a kill left behind between the two renames of a replacement.
        where = directory if directory.exists() else replaced_folder(directory)
        if directory.exists() and not directory.is_dir():
            kind = "a file" if directory.is_file() else "a device or a pipe"
            raise CordaError(f"{directory} is {kind}; name a folder")
        if entries(where) and not (where / REPORT).is_file():
            beside = ", ".join(path.name for path in entries(where)[:4])
            raise CordaError(
                f"{directory} is not empty and no export of corda_vlm (it has {beside}); name a new folder"
            )
        with atomic_folder(directory) as partial:
            yield partial
