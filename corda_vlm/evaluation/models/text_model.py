"""A model as the evaluators of text see it: what runs it, in which batches, and how it is left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from corda_vlm.errors import DataError
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.families.base import evaluating
from corda_vlm.families.generative.language import LanguageProcessor, Sample
from corda_vlm.progress import advance


@dataclass(frozen=True)
class TextGenerator:
    """Runs a model that generates text, for one evaluation; the model's mode is as before afterwards.

    Attributes:
        batch_size: samples at a time.
        bf16: run under bfloat16 autocast; probabilities are computed in float32 all the same.
    """

    model: nn.Module
    processor: LanguageProcessor
    batch_size: int = 64
    bf16: bool = False
    workers: int = 0

    @classmethod
    def of(cls, encoder: Encoder) -> TextGenerator:
        """The same model as `encoder`'s.

        Raises:
            CordaError: it does not generate text.
        """
        encoder.family.need_generative(encoder.model)
        processor = cast(LanguageProcessor, encoder.processor)
        return cls(encoder.model, processor, encoder.batch_size, encoder.bf16, encoder.workers)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def batches(
        self, samples: Sequence[Sample], side: str
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Samples of near lengths together, the longest first so that what does not fit shows at once."""
        order = sorted(range(len(samples)), key=lambda i: (-len(samples[i]["input_ids"]), i))
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        for at in range(0, len(order), self.batch_size):
            chosen = order[at : at + self.batch_size]
            batch = self.processor.collate([samples[i] for i in chosen], padding_side=side)
            moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
            if weight is not None and not self.bf16:  # images in the precision of the weights
                moved = {
                    name: tensor.to(weight.dtype) if tensor.is_floating_point() else tensor
                    for name, tensor in moved.items()
                }
            yield chosen, moved
            advance(len(chosen))

    def windows(self, count: int) -> Iterator[range]:
        """The records 0 … count − 1, so many at a time that their samples fit in memory and still sort by length."""
        step = 16 * self.batch_size
        for at in range(0, count, step):
            yield range(at, min(at + step, count))

    @contextmanager
    def running(self) -> Iterator[None]:
        with (
            evaluating(self.model),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            yield


def check_measured(measured: Sequence[object], data: object) -> None:
    """Raise `DataError` if nothing was measured: an average over nothing is no number."""
    if not measured:
        raise DataError(f"{data}: not one record could be measured")
