"""Open questions: an answer is right if it is one of the known ones, but for case, punctuation and articles."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from corda_vlm.data import ChatOptions
from corda_vlm.data.text.chat_options import PromptOptions
from corda_vlm.errors import DataError
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.models.generate import answered, question_of, references
from corda_vlm.evaluation.models.text_model import TextGenerator
from corda_vlm.evaluation.scores import Outcome
from corda_vlm.evaluation.tasks.base import Evaluator, known, registered, shares
from corda_vlm.evaluation.tasks.options import QA_METRICS as METRICS
from corda_vlm.evaluation.tasks.options import QaOptions
from corda_vlm.evaluation.tasks.registry import Metric
from corda_vlm.options import as_keywords

if TYPE_CHECKING:
    from corda_vlm.data import InstructionData

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:The|the|An|an|A|a) ")


def normalize_answer(answer: str, articles: bool = False) -> str:
    """An answer as it is compared: lower case, no punctuation, single spaces, and no articles unless `articles`.

    As in lm-evaluation-harness's NQ-open, articles are those with a space after them, not in capitals, taken out before
    punctuation: "vitamin A" keeps its A. White space in a row, which the harness keeps, counts as one here.
    """
    text = answer if articles else _ARTICLES.sub("", answer)
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def exact_match(answer: str, references: Sequence[str], *, articles: bool = False) -> float:
    """1 if the normalized answer equals a normalized reference, else 0.

    An answer of which normalization leaves nothing is wrong, unless it is a reference letter by letter.

    Raises:
        DataError: no reference.
    """
    if not references:
        raise DataError("an answer cannot be judged without a reference")
    if answer in references:
        return 1.0
    given = normalize_answer(answer, articles)
    return float(bool(given) and given in {normalize_answer(one, articles) for one in references})


def judged(metric: str, own: Metric, said: Sequence[tuple[str, list[str]]]) -> Outcome:
    """What a registered metric makes of answers, each with the right ones."""
    values = shares(metric, [own.judge(*one) for one in said], len(said))
    return Outcome(metric, values, chance=own.chance)


@dataclass(frozen=True)
class Qa(QaOptions, Evaluator):
    """Open questions, answered freely, by exact match with any of the known answers."""

    data: InstructionData
    metrics: Sequence[str] = METRICS

    def __post_init__(self) -> None:
        known(self.metrics, [*METRICS, *registered(self.metrics, "qa")], "qa")
        super().__post_init__()

    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        """Yield whether each question was answered rightly.

        Raises:
            DataError: no question is of use, or one has no answer.
        """
        chat = ChatOptions(**as_keywords(self, PromptOptions))
        said, right = [], []
        for index, record, answer in answered(
            TextGenerator.of(encoder), self.data, chat=chat, max_new_tokens=self.max_new_tokens, stop=self.stop
        ):  # fmt: skip
            known_answers = references(record, str(self.data.spec))
            said.append((answer, known_answers))
            right.append(exact_match(answer, known_answers, articles=self.articles))
            asked = question_of(record)
            self.note(encoder, index, answer, known_answers, right[-1], "exact_match", asked)
        own = registered(self.metrics, "qa")
        for metric in self.metrics:
            if metric in own:
                yield judged(metric, own[metric], said)
                continue
            yield Outcome(metric, np.asarray(right), chance=self.chance)
