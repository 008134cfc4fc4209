"""Folders and hub models in the format of transformers: what they hold, and what is missing from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.families.loading.trust import REFUSAL, check_config, trusted, wants_code
from corda_vlm.files import read_json


def reads(*types: str) -> Callable[[Path], bool]:
    """Does a folder hold the configuration of one of these model types, and weights?"""

    def found(folder: Path) -> bool:
        config = folder / "config.json"
        # Hub folders may hold open_clip's files too; without weights of transformers they are open_clip's.
        if not config.is_file() or not has_weights(folder):
            return False
        read = read_json(config, "model configuration")
        if not isinstance(read, dict):
            raise ForeignFileError(f"{config} is no model configuration: it holds no mapping")
        return read.get("model_type") in types

    return found


def has_weights(folder: Path) -> bool:
    """Are there weights of transformers?"""
    return any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def config_from(source: str | Path) -> Any:
    """The configuration of a model of transformers.

    Raises:
        RemoteCodeError: it names code.
    """
    import transformers

    told, _ = transformers.PretrainedConfig.get_config_dict(str(source))
    check_config(told, str(source))
    return transformers.AutoConfig.from_pretrained(source, trust_remote_code=trusted())


def how_to_read(source: str | Path) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained` for a model's weights.

    Raises:
        CordaError: a folder whose weights are pickles, which are programs.
    """
    if not Path(source).is_dir():
        return {"trust_remote_code": trusted()}
    if not any(Path(source).glob("model*.safetensors")):
        raise CordaError(f"{source} {PICKLED}")
    return {"trust_remote_code": trusted(), "use_safetensors": True}


PICKLED = (
    "has its weights as pickles (.bin, .pt, .pth) alone, which may hold any program and are not read. Load it where you "
    "trust it, and save it as safetensors: model.save_pretrained(FOLDER), or safetensors.torch.save_file"
)


def config_of(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder, empty where there is none that can be read."""
    try:
        read = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def tokenizer_of(source: str | Path, transformers: Any) -> Any:
    """The tokenizer that lies beside the weights.

    Raises:
        ValueError: there is none.
    """
    words = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trusted())
    if len(words) <= len(words.all_special_tokens):
        # transformers 5 makes a tokenizer of special tokens alone where there are no files: every text is unknown
        raise ValueError(f"{source} has no vocabulary")
    return words


@contextmanager
def without_bars(source: str | Path | None = None) -> Iterator[None]:
    """transformers' own bars are left out where there is nothing to download, as that is a matter of seconds.

    Args:
        source: what is loaded; None where something is saved.
    """
    from transformers.utils import logging

    downloads = source is not None and not Path(source).exists()
    if downloads or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


class Missing:
    """Stands for a processor that could not be loaded: using it says so."""

    def __init__(self, error: Exception, told: str) -> None:
        self.error, self.told = error, told

    def __call__(self, *args: object, **kwargs: object) -> Any:
        raise CordaError(self.told) from self.error


_ANY_FILE = (
    "the model came without the files that this needs (preprocessor_config.json for images; tokenizer.json, "
    "or vocab.json and merges.txt, for texts). Put them beside its weights."
)


def or_missing(load: Callable[[], Any], told: str = _ANY_FILE) -> Any:
    """What `load` gives, or its stand-in, which says `told` when it is used: a model can be adapted without it."""
    try:
        return load()
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        return Missing(error, f"the model {REFUSAL}" if wants_code(error) else told)


def image_size(vision: Any) -> tuple[int, int]:
    """(height, width) of a vision tower's input, from its configuration; zeros where it has none."""
    if (patches := getattr(vision, "num_patches", None)) is not None and not hasattr(
        vision, "image_size"
    ):
        side = int(patches**0.5) * vision.patch_size  # SigLIP 2
        return side, side
    side = getattr(vision, "image_size", None)
    if side is None:  # a text tower alone
        return 0, 0
    return (side, side) if isinstance(side, int) else (side[0], side[1])
