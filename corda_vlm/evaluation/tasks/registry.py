"""The kinds of tasks by name, and the metrics of one's own that some of them take.

A new kind is a file with its `Evaluator`, and a line here or a call of `register_task`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation.tasks import options
from corda_vlm.registries import register

if TYPE_CHECKING:
    from corda_vlm.evaluation.tasks.base import Evaluator


@dataclass(frozen=True)
class Metric:
    """A metric of one's own, of tasks that are there.

    Attributes:
        judge: what happened on an example, or on those of a batch, -> a share from 0 (wrong) to 1 (right) of each; what it
            is given says `TaskKind.judged_by`.
        chance: what guessing gives.
    """

    judge: Callable[..., Any]
    chance: float = 0.0


@dataclass(frozen=True)
class TaskKind:
    """What a suite has to know of a kind of task before a model is there.

    Attributes:
        evaluator: the class that measures it, or where that is, as "module:Class", which is imported on first use.
        metrics: all that it can measure by itself.
        usual: what it measures unless a suite asks for more; empty for all metrics.
        options: the class of options that a suite may give, or None where there are none.
        needs: the keys besides `data` that its tasks need in a suite, of "classes" and "templates".
        judged_by: the arguments with which it calls the metrics that are registered for it, in words; empty for a kind that
            takes none.
        predicts: does it note what the model said of each example, see `Evaluator.note`?
        registered: the metrics that are registered for it.
    """

    evaluator: str | type[Evaluator]
    metrics: tuple[str, ...]
    usual: tuple[str, ...] = ()
    options: type | None = None
    needs: tuple[str, ...] = ()
    judged_by: str = ""
    predicts: bool = False
    registered: dict[str, Metric] = field(default_factory=dict, compare=False)

    @property
    def all_metrics(self) -> tuple[str, ...]:
        """Its own metrics, and those that are registered for it."""
        return (*self.metrics, *self.registered)

    def load(self) -> type[Evaluator]:
        """The class that measures tasks of this kind."""
        if not isinstance(self.evaluator, str):
            return self.evaluator
        module, _, name = self.evaluator.partition(":")
        return getattr(import_module(module), name)


_HERE = __name__.rpartition(".")[0]
_ANSWER = "the answer and a list of the right ones, texts -> a number"

TASK_KINDS: dict[str, TaskKind] = {
    "zero_shot": TaskKind(
        f"{_HERE}.zero_shot:ZeroShot",
        options.ZERO_SHOT_METRICS,
        usual=("top1",),
        needs=("classes", "templates"),
        judged_by="logits (b, classes) and labels (b,), tensors -> (b,)",
        predicts=True,
    ),
    "retrieval": TaskKind(f"{_HERE}.retrieval:Retrieval", options.RETRIEVAL_METRICS),
    "vqa": TaskKind(
        f"{_HERE}.vqa:Vqa",
        options.VQA_METRICS,
        usual=("vqa_accuracy",),
        options=options.VqaOptions,
        judged_by=_ANSWER,
        predicts=True,
    ),
    "qa": TaskKind(
        f"{_HERE}.qa:Qa",
        options.QA_METRICS,
        options=options.QaOptions,
        judged_by=_ANSWER,
        predicts=True,
    ),
    "likelihood": TaskKind(
        f"{_HERE}.likelihood:AnswerLikelihood",
        options.LIKELIHOOD_METRICS,
        options=options.LikelihoodOptions,
    ),
    "multiple_choice": TaskKind(
        f"{_HERE}.multiple_choice:MultipleChoice",
        options.CHOICE_METRICS,
        options=options.ChoiceOptions,
        predicts=True,
    ),
    "perplexity": TaskKind(
        f"{_HERE}.perplexity:Perplexity",
        options.PERPLEXITY_METRICS,
        options=options.PerplexityOptions,
    ),
}


def register_task(name: str, kind: TaskKind) -> TaskKind:
    """Make a kind of task of your own known, so that suites may say `kind: name`. Returns it.

    Raises:
        CordaError: another kind of task has that name.
    """
    return register(TASK_KINDS, "kind of task", name, kind)


def register_metric(
    kind: str, name: str, judge: Callable[..., Any], *, chance: float = 0.0
) -> Metric:
    """Make a metric of your own known, so that suites may name it in `metrics` of tasks of this kind. Returns it.

    Args:
        kind: of tasks that take metrics: "zero_shot" calls `judge(logits, labels)` with tensors (b, classes) and (b,), and
            takes a number for each of the b examples; "qa" and "vqa" call `judge(answer, references)` with a text and a list
            of texts, and take one number.
        judge: gives 0 for a wrong example, 1 for a right one, or a share between.
        chance: what guessing gives.

    Raises:
        UnknownNameError: no such kind of task, or one that takes no metrics.
        CordaError: the kind has a metric of that name already, or `chance` is no share.
    """
    takers = {one: declared for one, declared in TASK_KINDS.items() if declared.judged_by}
    if kind not in takers:
        raise UnknownNameError("kind of task that takes metrics", kind, takers)
    if not 0 <= chance < 1:
        raise CordaError(
            f"the chance of metric {name!r} is {chance}; it is a share, from 0 to below 1"
        )
    declared, what = takers[kind], f"metric of {kind}"
    if name in declared.metrics:
        raise CordaError(f"a {what} named {name!r} is there already; give this one another name")
    metric = Metric(judge, chance)
    former = declared.registered.get(name)
    if former is not None and former == metric:
        return former
    return register(declared.registered, what, name, metric)
