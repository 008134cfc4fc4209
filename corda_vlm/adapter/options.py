"""How a plan is attached to a model; read before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from typing_extensions import TypedDict

from corda_vlm.families.options import Names
from corda_vlm.options import check_options

Base = Literal["untouched", "residual"]


@dataclass(frozen=True, kw_only=True)
class AttachOptions:
    """How an adapter is attached.

    Attributes:
        freeze_a: Train B only. The change of a layer's outputs is then `ΔB A x`: bounded, throughout training, by how little
            the directions of A see of the knowledge.
        base: What the layer keeps beside the adapter: the "untouched" original weight, or the "residual" `W − B₀A₀` as in
            the paper; see `corda_vlm.adapter.attach`.
        modules_to_save: Modules trained whole beside the adapter, by their dotted paths, e.g. LLaVA's
            model.multi_modal_projector. Such a model cannot be scaled.
    """

    freeze_a: bool = False
    base: Base = "untouched"
    modules_to_save: Names = ()

    def __post_init__(self) -> None:
        check_options(self)


class AttachKeywords(TypedDict, total=False):
    """`AttachOptions` as keywords of a function."""

    freeze_a: bool
    base: Base
    modules_to_save: Sequence[str]
