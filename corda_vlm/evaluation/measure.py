"""Measuring a model on a suite, task by task."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from typing_extensions import Unpack

from corda_vlm.distributed.agree import made_by_first, same_everywhere, told_by_first
from corda_vlm.distributed.deal import Share
from corda_vlm.errors import CordaError, DataError, NotFiniteError, UnknownNameError
from corda_vlm.evaluation.models.encoder import Cache, Encoder
from corda_vlm.evaluation.options import EvalKeywords, EvalOptions
from corda_vlm.evaluation.predictions import (
    Prediction,
    add_predictions,
    check_predicting,
    check_predictions,
    records_told,
)
from corda_vlm.evaluation.scores import BASE, Outcome, Score, value_text
from corda_vlm.evaluation.suite import Suite, Task, load_suite
from corda_vlm.evaluation.tasks.base import TaskContext
from corda_vlm.evaluation.tasks.registry import TASK_KINDS
from corda_vlm.options import options_from
from corda_vlm.precision import takes_bf16
from corda_vlm.progress import Meter, showing
from corda_vlm.sites import model_fingerprint

if TYPE_CHECKING:
    from corda_vlm.families.base import Loaded, Processor

logger = logging.getLogger(__name__)

DEFAULTS = EvalOptions()


@dataclass(frozen=True)
class TaskResult:
    """A measured task: its scores, what happened on each example, and how long it took.

    Attributes:
        predictions: what the model said of each example, where that was asked for and the kind of task has it.
        records: how the records of the predictions are read again, see `ModelPrediction`.
    """

    task: Task
    scores: tuple[Score, ...]
    outcomes: tuple[Outcome, ...]
    seconds: float
    predictions: tuple[Prediction, ...] = ()
    records: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        """One line: each metric with its interval."""
        line = ", ".join(
            f"{s.metric} {value_text(s.metric, s.value)} ({value_text(s.metric, s.low)} to {value_text(s.metric, s.high)})"
            for s in self.scores
        )
        return f"{self.task.name}: {line}; {self.scores[0].n:,} examples in {self.seconds:.0f} s"


def evaluate(
    model: nn.Module | Loaded,
    suite: str | Path | Mapping[str, Any] | Suite,
    *,
    processor: Processor | None = None,
    family: str = "auto",
    cache: Cache | None = None,
    head: Callable[[Tensor], Tensor] | None = None,
    show_progress: bool = False,
    predictions: str | Path | None = None,
    method: str = BASE,
    **options: Unpack[EvalKeywords],
) -> list[Score]:
    """Measure a model on a suite.

    Args:
        model: any model of a known family, bare or with an adapter, or what `load_model` returned.
        suite: a name of eval/suites, a path, a mapping or a `Suite`.
        processor: what `load_model` returned beside the model; needed unless `model` is its whole answer.
        family: of a bare model; "auto" detects it.
        cache: shared between the evaluations of a study, so that images are decoded once.
        head, show_progress: as of `measure`.
        predictions: a file of JSON lines to add to what the model said of each example, see `read_predictions`.
        method: what that file calls the model.
        options: of `EvalOptions`.

    Raises:
        CordaError: a bare model without its processor, or no task of which there are predictions.
        DataError, NotFiniteError, UnknownNameError: as of `measure`.
    """
    if isinstance(root := options.get("data_root"), Path):
        options["data_root"] = str(root)
    asked = options_from(EvalOptions, options, "evaluate")
    encoder = encoder_of(model, asked, processor=processor, family=family, cache=cache)
    if predictions is not None:
        suite = load_suite(suite)
        check_predicting(suite, asked.tasks)
        made_by_first("the predictions", partial(check_predictions, predictions))
    scores: list[Score] = []
    for result in measure(
        encoder, suite, asked, head=head, show_progress=show_progress, predict=predictions is not None
    ):  # fmt: skip
        if predictions is not None:
            add = partial(add_predictions, predictions, result, method=method)
            made_by_first("the predictions", add)
        scores += result.scores
    return scores


def encoder_of(
    model: nn.Module | Loaded,
    options: EvalOptions = DEFAULTS,
    *,
    processor: Processor | None = None,
    family: str = "auto",
    cache: Cache | None = None,
) -> Encoder:
    """What measures a model; arguments and errors as of `evaluate`."""
    from corda_vlm.families import family_of
    from corda_vlm.families.base import Loaded

    if isinstance(model, Loaded):
        net, of, processor = model.model, model.family, processor or model.processor
    elif processor is not None:
        net, of = model, family_of(family, model)
    else:
        raise CordaError(
            f"evaluate needs the processor that belongs to this {type(model).__name__}; load_model returns it "
            "beside the model: loaded = load_model(...), then evaluate(loaded, suite) or, once the model has "
            "an adapter, evaluate(model, suite, processor=loaded.processor)"
        )
    weight = next(net.parameters())
    return Encoder(
        net,
        of,
        processor,
        batch_size=options.batch_size,
        bf16=takes_bf16(options.bf16, weight.device, weights=weight.dtype),
        workers=options.workers,
        cache=cache or Cache(),
    )


def measure(
    encoder: Encoder,
    suite: str | Path | Mapping[str, Any] | Suite,
    options: EvalOptions = DEFAULTS,
    *,
    head: Callable[[Tensor], Tensor] | None = None,
    show_progress: bool = False,
    predict: bool = False,
) -> Iterator[TaskResult]:
    """Measure a model on a suite, task by task, so that each can be written down before the next begins.

    The processes of a distributed run deal the batches of examples out to each other, and all have the result: the scores of a
    single process. All of them have to call this, with the same model.

    Args:
        encoder: the model, as `encoder_of` gives it.
        suite: a name of eval/suites, a path, a mapping or a `Suite`.
        head: a classifier trained on the new task, image embeddings -> logits; in place of the prompts it judges the
            zero-shot tasks that do not measure retention.
        show_progress: how far each task is.
        predict: note what the model says of each example.

    Raises:
        UnknownNameError: no such suite or task.
        DataError: data that cannot be read as described, or all of it missing.
        NotFiniteError: the model's outputs are NaN or Inf, so there is no score; names the task and how many.
    """
    suite = load_suite(suite)
    encoder = _shared(encoder, suite, options)
    started = time.perf_counter()
    for task, data in tasks_with_data(suite, options, encoder.cache, limit=options.limit):
        what = _name_of(task, suite)
        root, cache = _root(suite, options), encoder.cache
        context = TaskContext(what, lambda spec, beside, r=root, c=cache: _load(spec, beside, r, c))
        evaluator = TASK_KINDS[task.kind].load().build(task, data, context)
        if head is not None and task.role != "retention":
            evaluator = evaluator.with_head(head)
        hearing = replace(encoder, heard=[]) if predict else encoder
        try:
            with (
                showing(show_progress and encoder.share.is_first),
                Meter(task.name, evaluator.examples, unit="example"),
            ):
                outcomes = tuple(evaluator.outcomes(hearing))
        except NotFiniteError as error:
            raise NotFiniteError(f"{what}: {error}") from error
        scores = tuple(o.score(task.name, task.role, resamples=options.resamples) for o in outcomes)
        if data.left_out:
            logger.warning("task %s: %s", task.name, data.left_out)
        said = tuple(hearing.heard or ())
        told = records_told(data, task.source) if said else None
        yield TaskResult(task, scores, outcomes, time.perf_counter() - started, said, told)
        started = time.perf_counter()


def _shared(encoder: Encoder, suite: Suite, options: EvalOptions) -> Encoder:
    """What measures this process's share of a distributed run.

    Raises:
        CordaError: the processes measure different things.
    """
    share = Share.here()
    if share.is_all:
        return encoder
    parts = {
        "the model": model_fingerprint(encoder.model, encoder.family),
        "the suite": [task.digest for task in suite.tasks],
    }
    same_everywhere(
        "what is measured",
        {**parts, **asdict(options)},
        "They deal the examples out to each other: give all of them the same model, suite and options",
    )
    # measured on each, where it was left open
    bf16 = told_by_first("the precision", lambda: encoder.bf16)
    return replace(encoder, share=share, bf16=bf16)


def tasks_with_data(
    suite: Suite, options: EvalOptions, cache: Cache, *, limit: int | None = None
) -> Iterator[tuple[Task, Any]]:
    """The tasks of a suite that are to be measured, each with its records; of those without, as the options say.

    Args:
        limit: at most so many records of each.

    Raises:
        UnknownNameError: no such task.
        DataError: records that cannot be read as the task describes them, or those of all tasks.
    """
    by_name = {task.name: task for task in suite.tasks}
    for name in options.tasks or ():
        if name not in by_name:
            raise UnknownNameError(f"task of suite {suite.name}", name, by_name)
    root, read = _root(suite, options), 0
    chosen = list(by_name if options.tasks is None else options.tasks)
    for name in chosen:
        try:
            data = task_data(by_name[name], root, cache, limit)
        except DataError as error:
            if options.missing == "error":
                raise DataError(f"{_name_of(by_name[name], suite)}: {error}") from error
            logger.warning("task %s is left out: %s", name, error)
            continue
        read += 1
        yield by_name[name], data
    if chosen and not read:
        raise DataError(f"no task of suite {suite.name} has its data under {root!r}; set data_root")


def _root(suite: Suite, options: EvalOptions) -> str:
    return suite.data_root if options.data_root is None else options.data_root


def _name_of(task: Task, suite: Suite) -> str:
    return f"task {task.name} of suite {suite.name}"


def task_data(task: Task, data_root: str, cache: Cache, limit: int | None = None) -> Any:
    """The records that a task is measured on.

    Raises:
        DataError: they cannot be read as the task describes them.
    """
    return _load(task.data, task.source, data_root, cache, _least(limit, task.limit))


def _load(
    spec: str | Mapping[str, Any],
    beside: Path | None,
    root: str,
    cache: Cache,
    limit: int | None = None,
) -> Any:
    from corda_vlm.data import load_records, with_root

    options = with_root(spec, root)
    if (least := _least(limit, options.get("limit"))) is not None:
        options["limit"] = least
    key = json.dumps([options, str(beside)], sort_keys=True, default=str)
    if key not in cache.data:
        cache.data[key] = load_records(options, beside=beside)
    return cache.data[key]


def _least(*limits: int | None) -> int | None:
    given = [limit for limit in limits if limit is not None]
    return min(given) if given else None
