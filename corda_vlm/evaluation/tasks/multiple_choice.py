"""Multiple choice: which of several answers is the most probable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from corda_vlm.data import ChatOptions
from corda_vlm.data.text.chat_options import PromptOptions
from corda_vlm.errors import DataError
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.models.generate import question_of
from corda_vlm.evaluation.models.likelihoods import scored_answers
from corda_vlm.evaluation.models.text_model import TextGenerator, check_any_measured
from corda_vlm.evaluation.scores import Outcome
from corda_vlm.evaluation.tasks.base import Evaluator, known
from corda_vlm.evaluation.tasks.options import CHOICE_METRICS as METRICS
from corda_vlm.evaluation.tasks.options import ChoiceOptions
from corda_vlm.options import as_keywords

if TYPE_CHECKING:
    from corda_vlm.data import InstructionData


@dataclass(frozen=True)
class MultipleChoice(ChoiceOptions, Evaluator):
    """The most probable of a question's choices.

    acc: by the log-likelihood of the whole choice; acc_norm: by that divided by the choice's characters, as
    lm-evaluation-harness has it. Of equals the first counts.
    """

    data: InstructionData
    metrics: Sequence[str] = METRICS

    def __post_init__(self) -> None:
        known(self.metrics, METRICS, "multiple-choice")
        super().__post_init__()

    @property
    def examples(self) -> None:
        return None  # each choice is one

    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        """Yield for each metric whether each question was answered rightly.

        Raises:
            DataError: no question is of use, or one has no choices.
        """
        right: dict[str, list[float]] = {metric: [] for metric in METRICS}
        chance = []
        chat = ChatOptions(**as_keywords(self, PromptOptions))
        generator = TextGenerator.of(encoder)
        for index, record, choices, scored in scored_answers(
            generator, self.data, _choices, chat=chat
        ):
            total = np.array([one.total for one in scored])
            size = np.array([len(choice) for choice in choices])
            chosen = {"acc": int(total.argmax()), "acc_norm": int((total / size).argmax())}
            for metric, choice in chosen.items():
                right[metric].append(float(choice == record["choice"]))
            chance.append(1 / len(choices))
            first = self.metrics[0]
            said, best = choices[chosen[first]], choices[record["choice"]]
            correct, asked = right[first][-1], question_of(record)
            self.note(encoder, index, said, [best], correct, first, asked)
        check_any_measured(chance, self.data.spec)
        for metric in self.metrics:
            yield Outcome(metric, np.asarray(right[metric]), chance=float(np.mean(chance)))


def _choices(record: Any, place: str) -> list[str]:
    if not record.get("choices"):
        raise DataError(f"{place}: has no choices; multiple choice needs a column of them")
    return [choice.strip() for choice in record["choices"]]
