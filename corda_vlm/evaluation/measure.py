"""Measuring a model on a suite, task by task."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from typing_extensions import Unpack

from corda_vlm.errors import CordaError, DataError, NotFiniteError, UnknownNameError
from corda_vlm.evaluation.models.encoder import Cache, Encoder
from corda_vlm.evaluation.options import EvalKeywords, EvalOptions
from corda_vlm.evaluation.scores import Outcome, Score, value_text
from corda_vlm.evaluation.suite import Suite, Task, load_suite
from corda_vlm.evaluation.tasks.base import Setting
from corda_vlm.evaluation.tasks.registry import TASK_KINDS
from corda_vlm.options import options_from
from corda_vlm.precision import Bf16, takes_bf16
from corda_vlm.progress import Meter, showing

if TYPE_CHECKING:
    from corda_vlm.families.base import Loaded, Processor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskResult:
    """A measured task: its scores, what happened on each example, and how long it took."""

    task: Task
    scores: tuple[Score, ...]
    outcomes: tuple[Outcome, ...]
    seconds: float

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
    **options: Unpack[EvalKeywords],
) -> list[Score]:
    """Measure a model on a suite; arguments and errors as of `measure`."""
    results = measure(
        model, suite, processor=processor, family=family, cache=cache, head=head, show_progress=show_progress, **options
    )  # fmt: skip
    return [score for result in results for score in result.scores]


def measure(
    model: nn.Module | Loaded,
    suite: str | Path | Mapping[str, Any] | Suite,
    *,
    processor: Processor | None = None,
    family: str = "auto",
    cache: Cache | None = None,
    head: Callable[[Tensor], Tensor] | None = None,
    show_progress: bool = False,
    **options: Unpack[EvalKeywords],
) -> Iterator[TaskResult]:
    """Measure a model on a suite, task by task, so that each can be written down before the next begins.

    Args:
        model: any model of a known family, bare or with an adapter, or what `load_model` returned.
        suite: a name of eval/suites, a path, a mapping or a `Suite`.
        processor: what `load_model` returned beside the model; needed unless `model` is its whole answer.
        family: of a bare model; "auto" detects it.
        cache: shared between the evaluations of a study, so that images are decoded once.
        head: a classifier trained on the new task, image embeddings -> logits; in place of the prompts it judges the
            zero-shot tasks that do not measure retention.
        show_progress: how far each task is.
        options: of `EvalOptions`.

    Raises:
        UnknownNameError: no such suite or task.
        DataError: data that cannot be read as described, or all of it missing.
        NotFiniteError: the model's outputs are NaN or Inf, so there is no score; names the task and how many.
    """
    if isinstance(root := options.get("data_root"), Path):
        options["data_root"] = str(root)
    asked = options_from(EvalOptions, options, "evaluate")
    suite = load_suite(suite)
    by_name = {task.name: task for task in suite.tasks}
    for name in asked.tasks or ():
        if name not in by_name:
            raise UnknownNameError(f"task of suite {suite.name}", name, by_name)
    encoder = _encoder(
        model,
        processor,
        family,
        batch_size=asked.batch_size,
        bf16=asked.bf16,
        workers=asked.workers,
        cache=cache or Cache(),
    )
    chosen = [by_name[name] for name in asked.tasks] if asked.tasks is not None else suite.tasks
    root = asked.data_root if asked.data_root is not None else str(suite.data_root)
    measured = 0
    for task in chosen:
        started = time.perf_counter()
        try:
            data = task_data(task, root, encoder.cache, asked.limit)
        except DataError as error:
            if asked.missing == "error":
                raise DataError(f"task {task.name} of suite {suite.name}: {error}") from error
            logger.warning("task %s is left out: %s", task.name, error)
            continue
        setting = Setting(
            f"task {task.name} of suite {suite.name}",
            lambda spec, beside: _load(spec, beside, root, encoder.cache),
        )
        evaluator = TASK_KINDS[task.kind].load().build(task, data, setting)
        if head is not None and task.role != "retention":
            evaluator = evaluator.with_head(head)
        try:
            with showing(show_progress), Meter(task.name, evaluator.examples, unit="example"):
                outcomes = tuple(evaluator.outcomes(encoder))
        except NotFiniteError as error:
            raise NotFiniteError(f"task {task.name} of suite {suite.name}: {error}") from error
        scores = tuple(o.score(task.name, task.role, resamples=asked.resamples) for o in outcomes)
        if data.left_out:
            logger.warning("task %s: %s", task.name, data.left_out)
        measured += 1
        seconds = time.perf_counter() - started
        yield TaskResult(task, scores, outcomes, seconds)
    if chosen and not measured:
        raise DataError(f"no task of suite {suite.name} has its data under {root!r}; set data_root")


def task_data(task: Task, data_root: str, cache: Cache, limit: int | None = None) -> Any:
    """The records that a task is measured on.

    Raises:
        DataError: they cannot be read as the task describes them.
    """
    return _load(task.data, task.source, data_root, cache, _least(limit, task.limit))


def _encoder(
    model: Any, processor: Processor | None, family: str, bf16: Bf16, **options: Any
) -> Encoder:
    from corda_vlm.families import family_of
    from corda_vlm.families.base import Loaded

    net = model.model if isinstance(model, Loaded) else model
    weight = next(net.parameters())
    options["bf16"] = takes_bf16(bf16, weight.device, weights=weight.dtype)
    if isinstance(model, Loaded):
        return Encoder(model.model, model.family, processor or model.processor, **options)
    if processor is None:
        raise CordaError(
            f"evaluate needs the processor that belongs to this {type(model).__name__}; load_model returns it "
            "beside the model: loaded = load_model(...), then evaluate(loaded, suite) or, once the model has "
            "an adapter, evaluate(model, suite, processor=loaded.processor)"
        )
    return Encoder(model, family_of(family, model), processor, **options)


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
