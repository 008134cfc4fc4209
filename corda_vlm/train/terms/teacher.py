"""What the model gave before it was trained: computed once, kept in memory and, where there is a folder, in a file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from corda_vlm.errors import ForeignFileError
from corda_vlm.families.base import evaluating, unwrap
from corda_vlm.run_files import TEACHER
from corda_vlm.tensors import load_tensors, save_tensors

logger = logging.getLogger(__name__)

Outputs = dict[str, Tensor]


def kept_outputs(
    folder: Path | None,
    identity: Mapping[str, Any],
    make: Callable[[], Outputs],
    is_of: Callable[[Outputs], bool],
) -> Outputs:
    """The outputs that `make` computes, or those that a file of the folder holds already.

    Args:
        folder: where files of several trainings may lie side by side; None keeps no file.
        identity: what the outputs depend on, as JSON: model, data, and how they are kept. The file is named by it.
        is_of: whether outputs that were read are the model's, as far as one batch of it tells. Those that are not, and a
            file that is damaged, are computed again.
    """
    if folder is None:
        return make()
    key = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:16]
    path = folder / TEACHER.replace("*", key)
    if path.is_file():
        try:
            found = load_tensors(path, "file of a model's outputs", "delete it")
            if is_of(found):
                return found
            why = "it holds the outputs of another model"
        except ForeignFileError as error:
            why = str(error)
        logger.warning("%s is made again: %s", path, why)
    made = make()
    about = {"identity": json.dumps(dict(identity), sort_keys=True)}
    if (later := _LATER.get()) is None:
        save_tensors(path, made, about)
    else:
        kept = dict(made)
        later.append(lambda: save_tensors(path, kept, about))
    return made


_LATER: ContextVar[list[Callable[[], None]] | None] = ContextVar("later", default=None)


@contextmanager
def written_later() -> Iterator[list[Callable[[], None]]]:
    """What writes the files of the outputs that are computed meanwhile: for a folder that may yet be refused."""
    later: list[Callable[[], None]] = []
    token = _LATER.set(later)
    try:
        yield later
    finally:
        _LATER.reset(token)


@contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Dropout off and running statistics left alone, so that a model is compared with what it was and with no noise.

    Not where activations are computed again for their gradients: transformers' models do that in training mode alone.
    """
    if getattr(unwrap(model), "is_gradient_checkpointing", False):
        yield
        return
    with evaluating(model):
        yield
