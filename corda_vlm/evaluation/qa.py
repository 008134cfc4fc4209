"""Open questions: an answer is right if it is one of the known ones, but for case, punctuation and articles."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from corda_vlm.data import ChatOptions
from corda_vlm.errors import DataError
from corda_vlm.evaluation.encoder import Encoder
from corda_vlm.evaluation.evaluator import Evaluator, known
from corda_vlm.evaluation.generation import answered, check_options, references
from corda_vlm.evaluation.scores import Outcome
from corda_vlm.evaluation.speaker import Speaker

if TYPE_CHECKING:
    from corda_vlm.data import InstructionData

METRICS = ("exact_match",)

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:The|the|An|an|A|a) ")


def normalise_answer(answer: str, articles: bool = False) -> str:
    """An answer as it is compared: lower case, no punctuation, single spaces, and no articles unless `articles`.

    As in lm-evaluation-harness's NQ-open, articles are those with a space after them, not in capitals, taken out before
    punctuation: "vitamin A" keeps its A. White space in a row, which the harness keeps, counts as one here.
    """
    found = answer if articles else _ARTICLES.sub("", answer)
    return " ".join(found.lower().translate(_NO_PUNCTUATION).split())


def exact_match(answer: str, references: Sequence[str], *, articles: bool = False) -> float:
    """1 if the normalised answer equals a normalised reference, else 0.

    An answer of which normalisation leaves nothing is wrong, unless it is a reference letter by letter.

    Raises:
        DataError: no reference.
    """
    if not references:
        raise DataError("an answer cannot be judged without a reference")
    if answer in references:
        return 1.0
    given = normalise_answer(answer, articles)
    return float(bool(given) and given in {normalise_answer(one, articles) for one in references})


@dataclass(frozen=True)
class Qa(Evaluator):
    """Open questions, answered freely, by exact match with any of the known answers.

    Attributes:
        template, max_tokens: as of `ChatOptions`.
        max_new_tokens, stop: of an answer; the harness stops at a line's end, a period and a comma.
        articles: articles count, as in the harness's TriviaQA; without, they do not, as in its NQ-open.
        chance: what a blind guess gives, for what is kept.
    """

    data: InstructionData
    metrics: Sequence[str] = METRICS
    template: str = "auto"
    max_tokens: int | None = None
    max_new_tokens: int = 32
    stop: Sequence[str] = ("\n", ".", ",")
    articles: bool = False
    chance: float = 0.0

    def __post_init__(self) -> None:
        known(self.metrics, METRICS, "qa")
        check_options("a qa task", {"max_new_tokens": self.max_new_tokens}, self.stop)

    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        """Yield whether each question was answered rightly.

        Raises:
            DataError: no question is of use, or one has no answer.
        """
        chat = ChatOptions(template=self.template, max_tokens=self.max_tokens)
        right = [
            exact_match(said, references(record, str(self.data.spec)), articles=self.articles)
            for record, said in answered(
                Speaker.of(encoder),
                self.data,
                chat=chat,
                max_new_tokens=self.max_new_tokens,
                stop=self.stop,
            )
        ]
        for metric in self.metrics:
            yield Outcome(metric, np.asarray(right), chance=self.chance)
