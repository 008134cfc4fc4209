"""Perplexity of documents: how surprised the model is by each token, given what came before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from corda_vlm.data import ChatOptions, ConversationBatches
from corda_vlm.errors import CordaError
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.models.likelihoods import likelihoods
from corda_vlm.evaluation.models.text_model import TextGenerator, check_any_measured
from corda_vlm.evaluation.scores import Outcome
from corda_vlm.evaluation.tasks.base import Evaluator, known
from corda_vlm.evaluation.tasks.options import PERPLEXITY_METRICS as METRICS
from corda_vlm.evaluation.tasks.options import PerplexityOptions
from corda_vlm.families.generative.language import IGNORED, Sample

if TYPE_CHECKING:
    from corda_vlm.data import InstructionData


@dataclass(frozen=True)
class Perplexity(PerplexityOptions, Evaluator):
    """Perplexity over all tokens of all documents, or of the answers of conversations.

    perplexity: exp of the mean negative log-likelihood over all tokens, so long documents count for more; lower is
    better. token_probability: its inverse, from 0 to 1, by which tasks are compared.

    A sequence longer than the window is read in windows that overlap: each token is predicted once, in the first
    window that reaches it, with at least window − stride tokens before it but at the start. The first token of a
    sequence is never predicted.
    """

    data: InstructionData
    metrics: Sequence[str] = METRICS

    def __post_init__(self) -> None:
        known(self.metrics, METRICS, "perplexity")
        super().__post_init__()

    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        """Yield for each metric the log-likelihood of each document, weighted by its tokens.

        Raises:
            DataError: no document of at least two tokens.
            CordaError: a window beyond the model's context, or a stride that is not below the window.
        """
        generator = TextGenerator.of(encoder)
        context = generator.processor.context
        window = self.window or context or 2048
        if context is not None and window > context:
            raise CordaError(
                f"window is {window}, and the model reads at most {context} tokens at once"
            )
        stride = max(1, window // 2) if self.stride is None else self.stride
        if not 1 <= stride < window:
            raise CordaError(
                f"stride is {stride}; it must be at least 1 and below the window of {window}, or the first token of "
                "each window would be predicted from nothing"
            )
        # No limit here: what is too long for one window is read in several.
        builder = ConversationBatches(
            self.data,
            replace(generator.processor, context=None),
            chat=ChatOptions(chat_template=self.chat_template),
            must_learn=True,
            cache_mb=0,
        )
        totals: list[float] = []
        tokens: list[int] = []
        for indices in generator.windows(len(self.data)):
            samples = [s for i in indices if (s := builder.sample(i)) is not None]
            cut = [windows(sample, window, stride) for sample in samples]
            scored = iter(likelihoods(generator, [piece for pieces in cut for piece in pieces]))
            for pieces in cut:
                own = [next(scored) for _ in pieces]
                totals.append(sum(one.total for one in own))
                tokens.append(sum(one.tokens for one in own))
        check_any_measured(totals, self.data.spec)
        each, weights = np.asarray(totals) / np.asarray(tokens), np.asarray(tokens, dtype=float)
        for metric in self.metrics:
            sign = -1.0 if metric == "perplexity" else 1.0
            yield Outcome(metric, sign * each, weights=weights, exp=True)


def windows(sample: Sample, window: int, stride: int) -> list[Sample]:
    """The windows of one sequence; labels are those of the tokens that no window before it reaches.

    Windows in which nothing is to be predicted are left out. A sequence that fits is its own window.
    """
    length = len(sample["input_ids"])
    if length <= window:
        return [sample]
    extra = [name for name, value in sample.items() if len(value) != length]
    if extra:
        raise CordaError(
            f"a sequence of {length} tokens with images ({', '.join(extra)}) does not fit the window of {window}, and "
            "windows cannot cut images"
        )
    pieces = []
    reached = 0
    for start in range(0, length, stride):
        end = min(start + window, length)
        piece = {name: value[start:end] for name, value in sample.items()}
        labels = piece["labels"].clone()
        labels[: reached - start] = IGNORED
        piece["labels"] = labels
        if bool((labels[1:] != IGNORED).any()):
            pieces.append(piece)
        reached = end
        if end == length:
            break
    return pieces
