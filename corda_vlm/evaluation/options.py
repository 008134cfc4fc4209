"""How models are measured; read before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from corda_vlm.data.text.chat_options import TemplateOptions
from corda_vlm.families.options import Names
from corda_vlm.options import Count, CountOrZero, check_options
from corda_vlm.precision import Bf16

RESAMPLES = 2000
"""Of a bootstrap: enough that an interval's ends move by a small share of its width."""

Missing = Literal["error", "skip"]


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How a model is measured on a suite.

    Attributes:
        tasks: Only these tasks of the suite; the default is all.
        limit: At most so many examples a task, for a quick look; the suite's own limits stay.
        data_root: The folder that {data_root} stands for in the suite; the default is what the suite says.
        missing: Whether a task without its data is an "error", or is left out ("skip") with a warning.
        batch_size: Examples a forward pass.
        bf16: Run the model under bfloat16 autocast: true, false, or auto, where the device multiplies bfloat16 faster.
            Similarities and probabilities are computed in float32 all the same.
        resamples: Of the bootstrap that gives the intervals.
        workers: Threads that decode and preprocess images; 0 uses the caller's.
    """

    tasks: Names | None = None
    limit: Count | None = None
    data_root: str | None = None
    missing: Missing = "error"
    batch_size: Count = 64
    bf16: Bf16 = "auto"
    resamples: Count = RESAMPLES
    workers: CountOrZero = 0

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class AskOptions(TemplateOptions):
    """How a model is asked a question.

    Attributes:
        max_new_tokens: The most tokens of the answer.
    """

    max_new_tokens: Count = 64

    def __post_init__(self) -> None:
        check_options(self)


class EvalKeywords(TypedDict, total=False):
    """`EvalOptions` as keywords of a function."""

    tasks: Sequence[str] | None
    limit: int | None
    data_root: str | Path | None
    missing: Missing
    batch_size: int
    bf16: Bf16
    resamples: int
    workers: int
