"""The kinds of tasks by name. A new kind is a file with its `Evaluator`, and a line here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from corda_vlm.evaluation.tasks import options

if TYPE_CHECKING:
    from corda_vlm.evaluation.tasks.base import Evaluator


@dataclass(frozen=True)
class TaskKind:
    """What a suite has to know of a kind of task before a model is there.

    Attributes:
        evaluator: the class that measures it, or where that is, as "module:Class", which is imported on first use.
        metrics: all that it can measure.
        usual: what it measures unless a suite asks for more; empty for all metrics.
        options: the class of options that a suite may give, or None where there are none.
        needs: the keys besides `data` that its tasks need in a suite, of "classes" and "templates".
    """

    evaluator: str | type[Evaluator]
    metrics: tuple[str, ...]
    usual: tuple[str, ...] = ()
    options: type | None = None
    needs: tuple[str, ...] = ()

    def load(self) -> type[Evaluator]:
        """The class that measures tasks of this kind."""
        if not isinstance(self.evaluator, str):
            return self.evaluator
        module, _, name = self.evaluator.partition(":")
        return getattr(import_module(module), name)


_HERE = __name__.rpartition(".")[0]

TASK_KINDS: dict[str, TaskKind] = {
    "zero_shot": TaskKind(
        f"{_HERE}.zero_shot:ZeroShot",
        options.ZERO_SHOT_METRICS,
        usual=("top1",),
        needs=("classes", "templates"),
    ),
    "retrieval": TaskKind(f"{_HERE}.retrieval:Retrieval", options.RETRIEVAL_METRICS),
    "vqa": TaskKind(
        f"{_HERE}.vqa:Vqa",
        options.VQA_METRICS,
        usual=("vqa_accuracy",),
        options=options.VqaOptions,
    ),
    "qa": TaskKind(f"{_HERE}.qa:Qa", options.QA_METRICS, options=options.QaOptions),
    "likelihood": TaskKind(
        f"{_HERE}.likelihood:AnswerLikelihood",
        options.LIKELIHOOD_METRICS,
        options=options.LikelihoodOptions,
    ),
    "multiple_choice": TaskKind(
        f"{_HERE}.multiple_choice:MultipleChoice",
        options.CHOICE_METRICS,
        options=options.ChoiceOptions,
    ),
    "perplexity": TaskKind(
        f"{_HERE}.perplexity:Perplexity",
        options.PERPLEXITY_METRICS,
        options=options.PerplexityOptions,
    ),
}
