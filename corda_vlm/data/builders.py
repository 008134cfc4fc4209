"""What builds batches: chosen in one place by what the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from corda_vlm.data.image_text import ImageTextBatches
from corda_vlm.data.records import Records
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.data.text.conversations import ConversationBatches
from corda_vlm.families.base import Processor
from corda_vlm.families.generative.language import LanguageProcessor


@runtime_checkable
class BatchBuilder(Protocol):
    """Builds the batch of any set of records: `ImageTextBatches`, or `ConversationBatches` for models that generate text.

    Attributes:
        workers: threads that prepare records.
        options: how records become tensors where there is a choice, else None. Part of the batches' fingerprint.
        towers: those that a batch holds inputs of.
    """

    workers: int

    @property
    def options(self) -> ChatOptions | None: ...
    @property
    def data(self) -> Any: ...
    @property
    def processor(self) -> Any: ...
    @property
    def towers(self) -> tuple[str, ...]: ...

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """The batch of the records at `indices`; {} if none of them is of use."""
        ...

    def warnings(self) -> list[str]:
        """What is to be said after a pass of how records became tensors."""
        ...


def batch_builder(
    data: Records,
    processor: Processor,
    *,
    towers: Sequence[str] | str | None = None,
    cache_mb: float = 512.0,
    workers: int = 0,
    chat: ChatOptions | None = None,
    must_learn: bool = False,
) -> BatchBuilder:
    """What builds the batches that this kind of model takes; `ImageTextBatches` and `ConversationBatches` say what the options mean."""
    if isinstance(processor, LanguageProcessor):
        return ConversationBatches(
            data, processor, chat=chat, must_learn=must_learn, cache_mb=cache_mb, workers=workers
        )
    return ImageTextBatches(data, processor, towers=towers, cache_mb=cache_mb, workers=workers)


def data_warnings(builder: BatchBuilder) -> list[str]:
    """What is to be said after a pass: records that were of no use, and conversations that were cut."""
    warnings = [builder.data.left_out, *builder.warnings()]
    return [f"{builder.data.spec}: {warning}" for warning in warnings if warning]
