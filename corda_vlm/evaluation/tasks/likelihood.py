"""How probable the right answer to a question is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from corda_vlm.data import ChatOptions
from corda_vlm.data.text.chat_options import PromptOptions
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.models.generate import references
from corda_vlm.evaluation.models.likelihoods import scored_answers
from corda_vlm.evaluation.models.text_model import TextGenerator, check_any_measured
from corda_vlm.evaluation.scores import Outcome
from corda_vlm.evaluation.tasks.base import Evaluator, known
from corda_vlm.evaluation.tasks.options import LIKELIHOOD_METRICS as METRICS
from corda_vlm.evaluation.tasks.options import LikelihoodOptions
from corda_vlm.options import as_keywords

if TYPE_CHECKING:
    from corda_vlm.data import InstructionData


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
        chat = ChatOptions(**as_keywords(self, PromptOptions))
        generator = TextGenerator.of(encoder)
        for _, _, _, scored in scored_answers(generator, self.data, self._answers, chat=chat):
            total.append(max(one.total for one in scored))
            each.append(max(one.total / one.tokens for one in scored))
        check_any_measured(total, self.data.spec)
        for metric in self.metrics:
            values = np.asarray(total if metric == "log_likelihood" else each)
            yield Outcome(metric, values, exp=metric == "token_probability")

    def _answers(self, record: Any, place: str) -> list[str]:
        return list(dict.fromkeys(references(record, place)))[: self.most_answers]
