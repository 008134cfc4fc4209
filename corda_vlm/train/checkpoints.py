"""Checkpoints of a training: each is sealed when it is whole, and gone on from only if it is what was sealed."""

from __future__ import annotations

import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer import (
    safe_globals,  # pyright: ignore[reportPrivateImportUsage]  # transformers 4 has it here alone
)

from corda_vlm.errors import CordaError, first_line
from corda_vlm.files import pieces, read_json, shown, write_json
from corda_vlm.tensors import load_tensors

logger = logging.getLogger(__name__)

SEAL = "checksums.json"
"""Size and CRC-32 of every other file of a checkpoint, written last."""

KEPT = 2
"""Checkpoints that stay on the disk: the last, and the one to fall back to."""

STATE = "trainer_state.json"
_PICKLED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def seal(folder: Path) -> None:
    """Note what a checkpoint holds, once all of it is on the disk.

    Raises:
        CordaError: the note cannot be written.
    """
    sizes = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.name != SEAL):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        sizes[path.name] = _size_and_crc(path)
    write_json(folder / SEAL, sizes)


def break_seal(folder: Path) -> None:
    """Before a checkpoint is written in the place of a former one."""
    (folder / SEAL).unlink(missing_ok=True)


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint in `output` that is whole.

    One that a kill cut short while it was written is passed over. One that was whole and is not any more is told of, and
    the one before it taken.

    Raises:
        CordaError: there are damaged ones and no other.
    """
    damaged: dict[Path, str] = {}
    for folder in sorted(output.glob("checkpoint-*"), key=step_of, reverse=True):
        if not _is_complete(folder):
            continue
        why = _damage(folder)
        if why is None:
            for other, reason in damaged.items():
                logger.warning(
                    "%s is damaged (%s); going on from %s", shown(other), reason, folder.name
                )
            return folder
        damaged[folder] = why
    if damaged:
        folders = ", ".join(f"{shown(folder)} ({why})" for folder, why in list(damaged.items())[:3])
        raise CordaError(
            f"no checkpoint is left to go on from, as they are damaged: {folders}. Delete "
            f"{'this folder' if len(damaged) == 1 else 'these folders'}, and the training begins anew."
        )
    return None


def step_of(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() and number.isascii() else -1


def _is_complete(folder: Path) -> bool:
    """Was all of it written? The seal says so; before there were seals the Trainer's state, which it writes last."""
    if (folder / SEAL).exists():
        return True
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(state, dict) and state.get("global_step") == step_of(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a complete checkpoint, or None."""
    try:
        if not (folder / SEAL).exists():
            return _damage_unsealed(folder)
        sealed = read_json(folder / SEAL, "list of checksums")
        if not isinstance(sealed, dict) or STATE not in sealed:
            return f"{SEAL} is not what was written"
        for name, noted in sealed.items():
            path = folder / Path(name).name
            if not path.is_file():
                return f"{name} is missing"
            if _size_and_crc(path) != noted:
                return f"{name} is not what was written"
    except (CordaError, OSError, ValueError) as error:
        return shown(str(error))
    return None


def _damage_unsealed(folder: Path) -> str | None:
    """As `_damage`, by reading everything. Pickled files are read as data: nothing in them is run."""
    try:
        TrainerState.load_from_json(str(folder / STATE))
    except Exception as error:  # whatever a wrong type leads to
        return f"{STATE}: {shown(str(error))}"
    for path in folder.glob("*.safetensors"):
        load_tensors(path, "weights", "")
    for name in _PICKLED:
        try:
            with safe_globals():
                torch.load(folder / name, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return f"{name} is missing"
        except Exception as error:  # of every kind, by what was hit
            return f"{name}: {shown(first_line(error))}"
    return None


def _size_and_crc(path: Path) -> dict[str, Any]:
    size, crc = 0, 0
    for piece in pieces(path):
        size, crc = size + len(piece), zlib.crc32(piece, crc)
    return {"bytes": size, "crc32": f"{crc:08x}"}
