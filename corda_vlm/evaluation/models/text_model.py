"""A model as the evaluators of text see it: what runs it, in which batches, and how it is left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from corda_vlm.errors import DataError
from corda_vlm.evaluation.models.base import MeasuredModel
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.families.generative.language import LanguageProcessor, Sample
from corda_vlm.progress import advance


@dataclass(frozen=True)
class TextGenerator(MeasuredModel):
    """Runs a model that generates text, for one evaluation."""

    processor: LanguageProcessor

    @classmethod
    def of(cls, encoder: Encoder) -> TextGenerator:
        """The same model as `encoder`'s.

        Raises:
            CordaError: it does not generate text.
        """
        encoder.family.need_generative(encoder.model)
        processor = cast(LanguageProcessor, encoder.processor)
        return cls(
            encoder.model, processor,
            batch_size=encoder.batch_size, bf16=encoder.bf16, workers=encoder.workers, share=encoder.share,
        )  # fmt: skip

    def batches(
        self, samples: Sequence[Sample], side: str
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Samples of near lengths together, the longest first so that what does not fit shows at once; those of the share."""
        order = sorted(range(len(samples)), key=lambda i: (-len(samples[i]["input_ids"]), i))
        for number, at in enumerate(range(0, len(order), self.batch_size)):
            chosen = order[at : at + self.batch_size]
            if not self.share.owns(number):
                advance(len(chosen))
                continue
            batch = self.processor.collate([samples[i] for i in chosen], padding_side=side)
            moved = {name: self.cast(tensor.to(self.device)) for name, tensor in batch.items()}
            yield chosen, moved
            advance(len(chosen))

    def windows(self, count: int) -> Iterator[range]:
        """The records 0 … count − 1, so many at a time that their samples fit in memory and still sort by length."""
        step = 16 * self.batch_size
        for at in range(0, count, step):
            yield range(at, min(at + step, count))


def check_any_measured(measured: Sequence[object], data: object) -> None:
    """Raise `DataError` if nothing was measured: an average over nothing is no number."""
    if not measured:
        raise DataError(f"{data}: not one record could be measured")
