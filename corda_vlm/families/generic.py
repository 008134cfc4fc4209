"""Any model at all, where the user says which of its `nn.Linear` and `nn.Conv2d` layers are meant.

    adapt(model, batches, targets=["encoder.layer.*.attention.self.query"])

Nothing is known of such a model but its layers. So each of them has a covariance of its own, also where several read one
tensor; all are in the tower "model", and have the role "linear" or "conv". A batch's `attention_mask` is that of the layers whose
inputs have its length; of all others every row counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

from corda_vlm.errors import DataError
from corda_vlm.families.base import Batch, Family, Rule, unwrap

TOWER = "model"
# the first number in a path is that of a block
_IN_BLOCK = r"(?P<path>(?:[^.]*[^.\d][^.]*\.)+(?P<block>\d+)\..+)"


def as_mapping(model: nn.Module, batch: object) -> object:
    """A batch as a mapping: a tensor is the first argument of the model's forward, a tuple or list those that it needs.

    The rest of a tuple is left out, as the labels that a data set gives beside its images. An argument that the forward
    could do without, such as an `attention_mask`, is given by a mapping alone.
    """
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, (tuple, list)):
        names = _arguments(model)
        needed = [
            one for one in names if _parameters(model)[one].default is inspect.Parameter.empty
        ]
        return dict(zip(needed or names[:1], batch, strict=False))
    return batch


def forward(model: nn.Module, batch: Batch) -> object:
    """Run the model on what it takes of a batch, by name.

    Raises:
        DataError: it takes nothing of it.
    """
    takes = _arguments(model)
    given = {key: value for key, value in batch.items() if key in takes} if takes else {**batch}
    if not given:
        raise DataError(
            f"{type(unwrap(model)).__name__} takes {', '.join(takes)}; the batch has: {', '.join(batch) or 'nothing'}"
        )
    return model(**given)


def _arguments(model: nn.Module) -> list[str]:
    """The names of what the model's forward takes; none where it takes whatever it is given."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in _parameters(model).values() if one.kind in kinds]


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(unwrap(model).forward).parameters


def _masks(batch: Batch) -> Mapping[str, Bool[Tensor, "b l"]]:
    mask: Any = batch.get("attention_mask")
    return {TOWER: mask.bool()} if isinstance(mask, Tensor) and mask.dim() == 2 else {}


GENERIC = Family(
    "generic",
    matches=lambda model: False,  # it is asked for by `targets`, never found
    rules=(
        Rule(_IN_BLOCK, TOWER, "conv", "{path}.in", only="conv"),
        Rule(r"(?P<path>.+)", TOWER, "conv", "{path}.in", only="conv"),
        Rule(_IN_BLOCK, TOWER, "linear", "{path}.in"),
        Rule(r"(?P<path>.+)", TOWER, "linear", "{path}.in"),
    ),
    forward=forward,
    masks=_masks,
    as_mapping=as_mapping,
    loose_towers=(TOWER,),  # layers may see other tokens than those of the mask
)
