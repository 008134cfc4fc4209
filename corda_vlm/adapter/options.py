"""How a plan is attached to a model; read before PyTorch is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from typing_extensions import TypedDict

from corda_vlm.errors import CordaError
from corda_vlm.families.options import Names
from corda_vlm.options import check_options

Base = Literal["untouched", "residual"]

MAX_SCALE = 2.0
"""WiSE-FT mixes within [0, 1]. Beyond 1 the line goes on, which a short training may gain by; beyond 2 the model is
further from the trained one than that is from the base, and nothing vouches for it."""


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


def check_scale(scale: float) -> float:
    """`scale` itself.

    Raises:
        CordaError: NaN, below 0 or above `MAX_SCALE`.
    """
    if not (math.isfinite(scale) and 0.0 <= scale <= MAX_SCALE):
        raise CordaError(
            f"scale {scale:g} is not between 0, the model before training, and {MAX_SCALE:g}; 1 is the trained model"
        )
    return float(scale)


def check_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """The scales of a sweep, each once, the strongest first.

    Raises:
        CordaError: none, or one that is no scale.
    """
    if not scales:
        raise CordaError("a scale sweep needs at least one scale, e.g. --scales 0.25,0.5,0.75,1")
    return tuple(sorted({check_scale(float(scale)) for scale in scales}, reverse=True))
