"""A GGUF file (llama.cpp's format) as a folder that transformers loads at once.

Reading one takes a while and unpacks its quantized blocks, so it is done once: the weights are kept in bfloat16,
which is finer than any quantization, in the folder that `CORDA_VLM_CACHE` names (else `~/.cache/corda_vlm`).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from corda_vlm.errors import CordaError, first_line
from corda_vlm.extras import require
from corda_vlm.families.loading.trust import trusted
from corda_vlm.files import atomic_folder, home_path
from corda_vlm.locks import locked

_SAMPLE = 1 << 20
_PATIENCE = 600.0  # seconds for another process to convert the same file


def cache_folder() -> Path:
    """Where converted models are kept."""
    named = os.environ.get("CORDA_VLM_CACHE")
    return home_path(named) if named else Path.home() / ".cache" / "corda_vlm"


def converted(path: Path) -> Path:
    """The folder with the model of a GGUF file, its configuration and tokenizer; made if it is not there.

    It appears whole or not at all.

    Raises:
        CordaError: the package gguf is not installed, the file is of another format or architecture, or writing failed.
    """
    folder = cache_folder() / "gguf" / f"{path.stem}-{_identity(path)}"
    if (folder / "config.json").is_file():
        return folder
    _check(path)
    within: Exception | None = None
    try:
        with locked(folder, wait=_PATIENCE):
            if not (folder / "config.json").is_file():  # another process was quicker
                with atomic_folder(folder) as partial:
                    try:
                        _convert(path, partial)
                    except (
                        Exception
                    ) as error:  # transformers' and gguf's own errors are of every kind
                        within = error
                        raise
    except CordaError as error:
        if error is within:
            raise
        raise CordaError(
            f"the converted {path.name} could not be kept: {error} The environment variable CORDA_VLM_CACHE names "
            "another folder"
        ) from error
    except Exception as error:
        raise CordaError(
            f"{path} does not load as a language model ({type(error).__name__}: {first_line(error)}); it may be truncated, or of an "
            "architecture that transformers does not read from GGUF"
        ) from error
    return folder


def _check(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CordaError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
    require("gguf", "gguf", f"reading {path.name}")


def _convert(path: Path, folder: Path) -> None:
    import transformers

    # Recent versions leave the blocks packed unless told otherwise, and will not save what came from a GGUF file.
    unpack = getattr(transformers, "GgufConfig", None)
    options = {} if unpack is None else {"quantization_config": unpack(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        trust_remote_code=trusted(),
        **options,
    )
    for left in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(left, None)
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=trusted()
    )
    if transformers.__version__.startswith("4."):
        _name_ends(tokenizer, model.config)
    tokenizer.save_pretrained(folder)


def _name_ends(tokenizer: Any, config: Any) -> None:
    """Set the beginning and end of text as the file has them: transformers 4 takes a Llama's beginning for both."""
    for name in ("bos", "eos"):
        number = getattr(config, f"{name}_token_id", None)
        if isinstance(number, int) and 0 <= number < len(tokenizer):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))


def _identity(path: Path) -> str:
    """Tells files of one name apart: their size, beginning and end."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:12]
