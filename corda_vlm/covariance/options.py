"""What a calibration may be asked for; read before PyTorch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.errors import CordaError
from corda_vlm.families.options import SiteKeywords, SiteOptions, Tokens
from corda_vlm.options import Count, Range, Seed

Precision = Literal["float32", "float64", "bf16", "auto"]


@dataclass(frozen=True, kw_only=True)
class CollectOptions(SiteOptions):
    """How covariances are collected from batches.

    Attributes:
        rounds: The batches are dealt, in turn, to this many covariances a stream, among which CorDA++ chooses
            (`dynamic_covariance`); other methods take all together.
        precision: Of the sums: float32, float64, bf16 (products in bfloat16 on a CPU and TF32 on CUDA, float32 sums), or
            auto: what a calibration began with, else bf16 where the device multiplies bfloat16 faster. The rounding of bf16
            covers the smallest directions, which the knowledge-preserved mode reads: it is for the
            instruction-previewed mode.
        tokens: Which tokens of a language model's sequence count: all, prompt, response, image or text; padding never does.
        blockwise: Of a language model: run one block after another, with the covariances of one of them in memory.
        checkpoint_share: The share of the time, at most, that goes into writing checkpoints; 1 writes one after every batch.
        output_side: Collect too what a change of each layer's outputs does to what the model gives out (CLIP's embeddings, a
            language model's next token), for `anchor_output`: backward passes as well, and more memory and disk.
        draws: Of the output side: random directions of each output, a backward pass each.
    """

    rounds: Count = 1
    precision: Precision = "float32"
    tokens: Tokens = "all"
    blockwise: bool = False
    checkpoint_share: Annotated[float, Range(above=0, at_most=1)] = 0.1
    output_side: bool = False
    draws: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_side and self.blockwise:
            raise CordaError(
                "the output side takes gradients through the whole model, and blockwise runs one block at a time: leave one of "
                "output_side and blockwise off"
            )


class CollectKeywords(SiteKeywords, total=False):
    """`CollectOptions` as keywords of a function."""

    rounds: int
    precision: Precision
    tokens: Tokens
    blockwise: bool
    checkpoint_share: float
    output_side: bool
    draws: int


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(CollectOptions, ChatOptions):
    """How a model is calibrated on records: which of them, in what batches, and how covariances are collected.

    Attributes:
        samples: At most so many records, drawn at random.
        batch_size: Records a forward pass.
        seed: Of the draw.
    """

    samples: Count = 256
    batch_size: Count = 64
    seed: Seed = 0
