"""What a method may be asked for; read before PyTorch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from corda_vlm.adapter.options import AttachKeywords, AttachOptions
from corda_vlm.options import Range
from corda_vlm.plan.options import DecompositionKeywords, DecompositionOptions


@dataclass(frozen=True, kw_only=True)
class MethodOptions(DecompositionOptions, AttachOptions):
    """What a method may be asked for; each method takes what it knows, and refuses the rest.

    Attributes:
        rho: Of "eva": a matrix gets at most so many times `rank`; see `attach_eva`.
    """

    rho: Annotated[float, Range(at_least=1)] | None = None


class MethodKeywords(DecompositionKeywords, AttachKeywords, total=False):
    """`MethodOptions` as keywords of a function."""

    rho: float | None
