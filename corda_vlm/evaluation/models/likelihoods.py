"""How probable a model finds the labeled tokens of samples, and the answers of records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from corda_vlm.data import ChatOptions, ConversationBatches, Record, no_labels
from corda_vlm.errors import CordaError
from corda_vlm.evaluation.models.finite import FiniteCheck
from corda_vlm.evaluation.models.text_model import TextGenerator
from corda_vlm.families.base import unwrap
from corda_vlm.families.generative.language import IGNORED, Sample
from corda_vlm.families.generative.next_token import next_token_logits


@dataclass(frozen=True)
class Likelihood:
    """The labeled tokens of one sample.

    Attributes:
        total: the sum of their log-likelihoods, in nats.
        tokens: how many they are.
    """

    total: float
    tokens: int


@torch.no_grad()
def likelihoods(generator: TextGenerator, samples: Sequence[Sample]) -> list[Likelihood]:
    """The log-likelihood of each sample's labeled tokens, in the order of the samples.

    Raises:
        CordaError: a sample without a labeled token that has one before it.
        NotFiniteError: the model's output is NaN or Inf.
    """
    by_index = generator.together("likelihoods", lambda: _own(generator, samples), (Likelihood,))
    return [by_index[index] for index in range(len(samples))]


def _own(generator: TextGenerator, samples: Sequence[Sample]) -> dict[int, Likelihood]:
    """Index of a sample -> its likelihood, of the samples in this process's batches."""
    by_index: dict[int, Likelihood] = {}
    check = FiniteCheck("texts")
    for chosen, batch in generator.batches(samples, "right"):
        labels = batch["labels"][:, 1:]  # position i predicts token i + 1
        labeled = labels != IGNORED
        if not bool(labeled.any(1).all()):
            raise CordaError("a sample has no labeled token whose likelihood could be told")
        with generator.running():
            model = unwrap(generator.model)
            logits = next_token_logits(model, no_labels(batch), labeled)  # (n, V)
        targets = labels[labeled].to(logits.device)
        predicted = logits.float().log_softmax(-1)  # (n, V)
        each = predicted.gather(1, targets[:, None])[:, 0]  # (n,)
        row = torch.nonzero(labeled)[:, 0].cpu()
        total = torch.zeros(len(chosen), dtype=torch.float64).index_add_(
            0, row, each.double().cpu()
        )
        check(total)
        for place, index in enumerate(chosen):
            count = int((row == place).sum())
            by_index[index] = Likelihood(float(total[place]), count)
    return by_index


def scored_answers(
    generator: TextGenerator,
    data: Any,
    answers_of: Callable[[Record, str], list[str]],
    *,
    chat: ChatOptions,
) -> Iterator[tuple[int, Record, list[str], list[Likelihood]]]:
    """Yield each record of use, after its number, with its answers and their likelihoods, in the order of the records.

    Args:
        answers_of: (record, where a person finds it) -> the answers to score.
    """
    builder = ConversationBatches(data, generator.processor, chat=chat, cache_mb=0)
    for window in generator.windows(len(data)):
        records: list[tuple[int, Any, list[str]]] = []
        samples: list[Sample] = []
        for index in window:
            record = data.get(index)
            if record is None:
                continue
            answers = answers_of(record, data.place(index))
            own = [builder.answered(index, answer) for answer in answers]
            kept = [sample for sample in own if sample is not None]
            # A question of which one choice does not fit cannot be answered fairly.
            if len(kept) == len(own):
                records.append((index, record, answers))
                samples += kept
        scored = iter(likelihoods(generator, samples))
        for index, record, answers in records:
            yield index, record, answers, [next(scored) for _ in answers]
