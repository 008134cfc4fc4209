"""Answers by their likelihood: how probable the right one is, and which of several choices is the most probable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from corda_vlm.data import ChatOptions, ConversationBatches, no_labels
from corda_vlm.errors import CordaError, DataError
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.models.finite import FiniteCheck
from corda_vlm.evaluation.models.generate import references
from corda_vlm.evaluation.models.text_model import TextGenerator, check_measured
from corda_vlm.evaluation.scores import Outcome
from corda_vlm.evaluation.tasks.base import Evaluator, known
from corda_vlm.evaluation.tasks.registry import CHOICE_METRICS, ChoiceOptions, LikelihoodOptions
from corda_vlm.evaluation.tasks.registry import LIKELIHOOD_METRICS as METRICS
from corda_vlm.families.base import unwrap
from corda_vlm.families.language import IGNORED, Sample

if TYPE_CHECKING:
    from corda_vlm.data import InstructionData


@dataclass(frozen=True)
class Likelihood:
    """The labelled tokens of one sample.

    Attributes:
        total: the sum of their log-likelihoods, in nats.
        tokens: how many they are.
    """

    total: float
    tokens: int


@torch.no_grad()
def likelihoods(generator: TextGenerator, samples: Sequence[Sample]) -> list[Likelihood]:
    """The log-likelihood of each sample's labelled tokens, in the order of the samples.

    Raises:
        CordaError: a sample without a labelled token that has one before it.
        NotFiniteError: the model's output is NaN or Inf.
    """
    found: dict[int, Likelihood] = {}
    check = FiniteCheck("texts")
    for chosen, batch in generator.batches(samples, "right"):
        labels = batch["labels"][:, 1:]  # position i predicts token i + 1
        learnt = labels != IGNORED
        if not bool(learnt.any(1).all()):
            raise CordaError("a sample has no labelled token whose likelihood could be told")
        with generator.running():
            logits = unwrap(generator.model)(**no_labels(batch), use_cache=False).logits[:, :-1]
        # Only where it is asked for: the whole (B, L, V) in float32 may not fit.
        picked = logits[learnt].float().log_softmax(-1)  # (n, V)
        each = picked.gather(1, labels[learnt][:, None])[:, 0]  # (n,)
        row = torch.nonzero(learnt)[:, 0].cpu()
        total = torch.zeros(len(chosen), dtype=torch.float64).index_add_(
            0, row, each.double().cpu()
        )
        check(total)
        for place, index in enumerate(chosen):
            count = int((row == place).sum())
            found[index] = Likelihood(float(total[place]), count)
    return [found[index] for index in range(len(samples))]


@dataclass(frozen=True)
class AnswerLikelihood(LikelihoodOptions, Evaluator):
    """How probable the right answer is after the question; of several right ones the most probable counts.

    token_probability: exp of the mean over questions of the log-likelihood per token, from 0 to 1. A ratio of two
    models' is what one keeps of the other's certainty, so that is what tasks are compared by.
    log_likelihood: the mean over questions of the log-likelihood of the whole answer, in nats, at most 0.
    log_likelihood_per_token: the mean over questions of that divided by the answer's tokens.

    Only the answer's own characters are scored, not the token that ends the turn.
    """

    data: InstructionData
    metrics: Sequence[str] = METRICS

    def __post_init__(self) -> None:
        known(self.metrics, METRICS, "likelihood")
        super().__post_init__()

    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        """Yield for each metric what happened on each question.

        Raises:
            DataError: no question is of use, or one has no answer.
        """
        total, each = [], []
        for _, _, scored in _scored(TextGenerator.of(encoder), self, self._answers):
            total.append(max(one.total for one in scored))
            each.append(max(one.total / one.tokens for one in scored))
        check_measured(total, self.data.spec)
        for metric in self.metrics:
            values = np.asarray(total if metric == "log_likelihood" else each)
            yield Outcome(metric, values, exp=metric == "token_probability")

    def _answers(self, record: Any, place: str) -> list[str]:
        return list(dict.fromkeys(references(record, place)))[: self.most_answers]


@dataclass(frozen=True)
class MultipleChoice(ChoiceOptions, Evaluator):
    """The most probable of a question's choices.

    acc: by the log-likelihood of the whole choice; acc_norm: by that divided by the choice's characters, as
    lm-evaluation-harness has it. Of equals the first counts.
    """

    data: InstructionData
    metrics: Sequence[str] = CHOICE_METRICS

    def __post_init__(self) -> None:
        known(self.metrics, CHOICE_METRICS, "multiple-choice")
        super().__post_init__()

    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        """Yield for each metric whether each question was answered rightly.

        Raises:
            DataError: no question is of use, or one has no choices.
        """
        right: dict[str, list[float]] = {metric: [] for metric in CHOICE_METRICS}
        chance = []
        for record, choices, scored in _scored(TextGenerator.of(encoder), self, _choices):
            total = np.array([one.total for one in scored])
            size = np.array([len(choice) for choice in choices])
            right["acc"].append(float(total.argmax() == record["choice"]))
            right["acc_norm"].append(float((total / size).argmax() == record["choice"]))
            chance.append(1 / len(choices))
        check_measured(chance, self.data.spec)
        for metric in self.metrics:
            yield Outcome(metric, np.asarray(right[metric]), chance=float(np.mean(chance)))


def _choices(record: Any, place: str) -> list[str]:
    if not record.get("choices"):
        raise DataError(f"{place}: has no choices; multiple choice needs a column of them")
    return [choice.strip() for choice in record["choices"]]


def _scored(
    generator: TextGenerator, task: AnswerLikelihood | MultipleChoice, answers_of: Any
) -> Iterator[tuple[Any, list[str], list[Likelihood]]]:
    """Yield each record of use with its answers and their likelihoods, in the order of the records."""
    data: Any = task.data
    chat = ChatOptions(template=task.template, max_tokens=task.max_tokens)
    builder = ConversationBatches(data, generator.processor, chat=chat, cache_mb=0)
    for window in generator.windows(len(data)):
        records: list[tuple[Any, list[str]]] = []
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
                records.append((record, answers))
                samples += kept
        scored = iter(likelihoods(generator, samples))
        for record, answers in records:
            yield record, answers, [next(scored) for _ in answers]
