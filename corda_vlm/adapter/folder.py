"""Folders: a whole model in the format of its own library, and a folder that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from corda_vlm.errors import CordaError
from corda_vlm.families import convert
from corda_vlm.families.open_clip_config import open_clip_config
from corda_vlm.files import asset, atomic_folder, entries, replaced_folder, write_json
from corda_vlm.locks import locked

REPORT = "corda_export.json"  # marks a folder as ours, so that a later export may replace it


def is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained") and hasattr(model, "config")


def save_model(model: nn.Module, folder: Path, source: str | Path | None) -> None:
    """Write a bare, packed model as its own library loads it, with the processor's files that lie in `source`."""
    folder.mkdir(exist_ok=True)
    if is_transformers(model):
        model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        _copy_beside(source or getattr(model, "name_or_path", None), folder)
        return
    write_json(folder / "open_clip_config.json", open_clip_config(model, source))
    tensors = {k: v.detach().to("cpu").contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    _copy_beside(source, folder)


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
    with locked(directory):
        # Also what a kill left behind between the two renames of a replacement.
        where = directory if directory.exists() else replaced_folder(directory)
        if directory.is_file():
            raise CordaError(f"{directory} is a file; name a folder")
        if entries(where) and not (where / REPORT).is_file():
            beside = ", ".join(path.name for path in entries(where)[:4])
            raise CordaError(
                f"{directory} is not empty and no export of corda_vlm (it has {beside}); name a new folder"
            )
        with atomic_folder(directory) as partial:
            yield partial
