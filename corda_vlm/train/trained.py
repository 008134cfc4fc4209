"""What a training left in its folder, on its model again, at any strength between before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn

from corda_vlm.adapter import at_scale, check_scale, load_adapter
from corda_vlm.adapter.base import check_base
from corda_vlm.adapter.folder import CONFIG, TRAINED, WEIGHTS, weights_folder
from corda_vlm.errors import ForeignFileError
from corda_vlm.tensors import read_header
from corda_vlm.train.heads import Head
from corda_vlm.train.weights import HEAD, load_weights


@dataclass(frozen=True)
class Trained:
    """A trained model with what its scaling needs.

    Attributes:
        model: with an adapter, or with trained weights of its own that require gradients, or frozen where only a head
            was trained.
        head: the trained classifier, if there is one.
        base: the weights before training (or the model before training); None where an adapter leaves them as they were.
    """

    model: nn.Module
    head: Head | None = None
    base: Mapping[str, Tensor] | nn.Module | None = None

    @contextmanager
    def at_scale(self, scale: float) -> Iterator[Head | None]:
        """Within the block `model` has this strength: 0 the model before training, 1 the trained one. Gives the head of
        the same strength, for `measure(..., head=)`.

        Raises:
            CordaError: as `corda_vlm.adapter.at_scale`, or a head that has no zero-shot counterpart.
        """
        check_scale(scale)
        head = None if self.head is None else self.head.at_scale(scale)
        with ExitStack() as stack:
            if scale != 1.0 and not (self.head is not None and _is_frozen(self.model)):
                stack.enter_context(at_scale(self.model, scale, base=self.base))
            yield head


def load_trained(model: nn.Module, directory: str | Path) -> Trained:
    """Put what a training wrote onto the model it began with: an adapter, a full fine-tune, or a head alone.

    Args:
        model: bare, as before the training.
        directory: the training's folder, its `weights/`, or any folder with an adapter as PEFT saves it.

    Raises:
        ForeignFileError: nothing trained there, or something damaged or of another model.
    """
    folder = weights_folder(directory)
    head = Head.load(folder / HEAD) if (folder / HEAD).is_file() else None
    if (folder / CONFIG).is_file():
        return Trained(load_adapter(model, folder), head)
    if not (folder / TRAINED).is_file():
        raise ForeignFileError(
            f"no trained weights in {folder}: expected adapter_config.json or {TRAINED}, as a training writes into "
            f"its {WEIGHTS}/ when it is finished"
        )
    check_base(model, folder, folder / TRAINED)
    names, _ = read_header(folder / TRAINED, "trained weights", "train again")
    before = {
        name: value.detach().clone() for name, value in model.state_dict().items() if name in names
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    load_weights(model, None, folder)
    return Trained(model, head, before)


def _is_frozen(model: nn.Module) -> bool:
    trains = any(parameter.requires_grad for parameter in model.parameters())
    return not trains and not isinstance(model, PeftModel)
