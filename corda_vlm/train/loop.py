"""One training from start, or from where it was interrupted, to its weights on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from signal import SIGTERM
from typing import Any

from torch import nn
from transformers import TrainerCallback

from corda_vlm.anchor import Anchor
from corda_vlm.data import (
    BatchBuilder,
    BatchLoader,
    Records,
    batch_builder,
    data_warnings,
    make_batches,
)
from corda_vlm.errors import NotFiniteError
from corda_vlm.families import detect_family
from corda_vlm.families.base import Processor, unwrap
from corda_vlm.locks import locks
from corda_vlm.progress import note
from corda_vlm.run_files import DONE, HISTORY
from corda_vlm.train.budget.budget import Budget
from corda_vlm.train.budget.spent import Spent
from corda_vlm.train.budget.unseen import check_unseen
from corda_vlm.train.checkpoints import last_checkpoint, step_of
from corda_vlm.train.folder import (
    begin,
    check_begun,
    finish,
    finished,
    runs_in_bf16,
    training_plan,
    with_terms,
)
from corda_vlm.train.heads import Template
from corda_vlm.train.model import as_it_was, check_anchor, check_trainable, checkpointing
from corda_vlm.train.objectives import Objective, make_objective
from corda_vlm.train.options import TrainOptions, TrainResult
from corda_vlm.train.penalty import check_steered
from corda_vlm.train.steps import StepBatches
from corda_vlm.train.terms.make import KnowledgeData, TaskData, held_to, known_of
from corda_vlm.train.terms.teacher import written_later
from corda_vlm.train.terms.term import Penalty, Term, check_names
from corda_vlm.train.trackers import tracked
from corda_vlm.train.trainer import make_trainer
from corda_vlm.train.watch import Watch
from corda_vlm.train.weights import (
    all_finite,
)

logger = logging.getLogger(__name__)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C: the checkpoint is saved, and the message says how to go on."""


@locks("output_dir", inside=True)
def train(
    model: nn.Module,
    data: Records,
    processor: Processor,
    *,
    options: TrainOptions,
    output_dir: str | Path,
    classes: Sequence[str] | None = None,
    templates: Sequence[Template] | None = None,
    eval_data: Records | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    anchor: Anchor | None = None,
    anchor_weight: float = 0.0,
    anchor_every: int = 1,
    extra_loss: Penalty | None = None,
    extra_weight: float = 1.0,
    terms: Sequence[Term] | Callable[[], Sequence[Term]] = (),
    knowledge: Records | KnowledgeData | None = None,
    budget: Budget | None = None,
    show_progress: bool = True,
) -> TrainResult:
    """Train what requires a gradient in `model`, in place, and write the result into `output_dir`.

    If `output_dir` holds an interrupted training of the same kind, it goes on from its last checkpoint and
    ends where it would have ended; if it holds a finished one, its weights are loaded into `model`.

    Args:
        model: any model of a known family, bare or a `PeftModel`, with `requires_grad` set; it stays on its
            device and in its mode.
        data: what to learn from; labels for "prompt" and "linear", texts for "contrastive".
        processor: the model's.
        options: see `TrainOptions`.
        output_dir: gets `train.json` (what is trained), `history.jsonl`, `checkpoint-N/` while it runs, and
            then `weights/` and `result.json`.
        classes: names for the prompts, in the order of the labels; default `data.class_names`.
        templates: prompts with `{}` for the name; default "a photo of a {}.".
        eval_data: evaluated every `options.eval_every` steps and at the end, into the history.
        callbacks: further callbacks of transformers.
        anchor: of `anchor_penalty(model, store)`, built before this call, as an interrupted training's weights are
            loaded here. In the history, as the forecast of forgetting.
        anchor_weight: the loss gets so many times the anchor; with 0 it is only in the history.
        anchor_every: only at every so many steps, with so many times the weight, see `PenaltyMixin.penalize`.
        extra_loss: another term of the loss that looks at the weights; in the history, unweighted.
        extra_weight: its weight.
        terms: further terms of the loss; in the history by their names, unweighted. They are built before this call, or by a
            function that is called once the folder is known to be this training's.
        knowledge: records of what is to be kept: the model is held to what it gave on them before training, by distillation
            with the weight `DISTILL`. Of plain records as many are drawn as `calibrate` draws. For other terms that look at
            such records pass `terms`.
        budget: how much of what the model knew is to be kept, of `forgetting_budget`, built before this call. The weight of its
            term is steered, and the model and `weights/` get the largest strength that keeps it; `result.json` and the result
            tell.
        show_progress: a progress bar with loss, rate and throughput.

    Raises:
        NotFiniteError: the loss, a penalty or the weights became NaN or Inf: the training diverged.
        CordaError: nothing to train, `output_dir` of another training, disk full, a weight
            without an anchor, an anchor or a budget of another model, or a probe that is trained on.
        DataError: the data lacks what the loss needs.
        TrainingInterrupted: Ctrl-C.
    """
    output = Path(output_dir)
    options = options.complete(data.spec.format)
    options = replace(options, bf16=runs_in_bf16(options, output, model))
    family = detect_family(unwrap(model))
    objective = make_objective(options, model, family, processor, data, classes, templates)
    check_trainable(model, objective, options)
    check_anchor(model, anchor, anchor_weight)
    inputs: dict[str, Any] = {
        "towers": objective.towers,
        "cache_mb": options.cache_mb,
        "workers": options.workers,
        "chat": options,
        "must_learn": True,
    }
    builder = batch_builder(data, processor, **inputs)
    less_memory = checkpointing(model) if options.gradient_checkpointing else nullcontext()
    if budget is not None:
        budget.check_model(model)
        check_unseen(budget.probe.records, known_of(knowledge), data)
    plan = training_plan(model, data, options, classes, templates, budget)
    check_begun(output, plan, model)
    with written_later() as files:
        terms = terms() if callable(terms) else terms
        if knowledge is not None:
            task = TaskData(data, options, classes, templates)
            terms = [*terms, *held_to(knowledge, model, processor, task, output)]
    every = _terms(anchor, anchor_weight, anchor_every, extra_loss, extra_weight, terms)
    if budget is not None:
        check_steered(budget, model, every)
    plan = with_terms(plan, every)
    begin(output, plan, model)
    for write in files:
        write()
    if (output / DONE).is_file():
        return finished(output, model, objective)

    known = data_warnings(builder)
    evaluated = None
    if eval_data is not None:
        size = max(options.batch_size, 64)
        evaluated = make_batches(eval_data, processor, batch_size=size, **inputs)
    trainer, watch = _watched_trainer(
        model,
        objective,
        _step_batches(builder, len(data), options),
        options,
        output,
        evaluated,
        callbacks,
        show_progress,
    )
    for term in every:
        trainer.add_term(term)
    if budget is not None:
        trainer.steer(budget)
    checkpoint = last_checkpoint(output)
    with as_it_was(model), less_memory, watch.interrupts, tracked(options.report_to):
        _run(trainer, watch, checkpoint)
    for warning in data_warnings(builder):
        if warning not in known:  # of an earlier training on the same records
            logger.warning("%s", warning)
    done = trainer.state.global_step
    _stop_if_asked(watch, done, trainer.state.max_steps, output)
    trainer.settle()
    if not all_finite(model, objective.head):
        raise NotFiniteError(trainer._not_finite("the weights are NaN or Inf"))
    resumed = None if checkpoint is None else step_of(checkpoint)
    spent = None
    if budget is not None:
        own = evaluated or _some_of(data, processor, options.batch_size, inputs)
        spent = _spend(budget, trainer, own, show_progress)
    return finish(output, model, objective, watch, done, resumed, base=plan["base"], spent=spent)


def _some_of(
    data: Records, processor: Processor, batch_size: int, inputs: dict[str, Any]
) -> BatchLoader:
    """Batches of the task's own records, on which the cost of a budget is told."""
    given: dict[str, Any] = {"batch_size": batch_size, "limit": _OF_TASK, **inputs}
    return make_batches(data, processor, shuffle=True, **given)


_OF_TASK = 512


def _spend(budget: Budget, trainer: Any, batches: BatchLoader, show_progress: bool) -> Spent:
    """Take the strength that keeps the budget, and say what that cost."""

    def measured() -> dict[str, float]:
        return {
            name.removeprefix("eval_"): round(value, 6)
            for name, value in trainer.measure(batches).items()
        }

    weight = None if budget.term is None else trainer.weight_of(budget.term)
    spent = budget.spend(measured, weight)
    if show_progress:
        note(f"the model {spent}")
    return spent


def _terms(
    anchor: Anchor | None,
    anchor_weight: float,
    anchor_every: int,
    extra_loss: Penalty | None,
    extra_weight: float,
    further: Sequence[Term],
) -> list[Term]:
    """All terms of the loss beside the task's own, each under a name of its own."""
    terms = list(further)
    if extra_loss is not None:
        terms.insert(0, Term("extra_loss", extra_loss, extra_weight))
    if anchor is not None:
        terms.insert(0, Term("anchor", anchor, anchor_weight, anchor_every, anchor.identity))
    check_names(terms)
    return terms


def _run(trainer: Any, watch: Watch, checkpoint: Path | None) -> None:
    """Train from a checkpoint on, or from the start."""
    try:
        trainer.restore(checkpoint)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        watch.close()


def _step_batches(builder: BatchBuilder, count: int, options: TrainOptions) -> StepBatches:
    """The batches of all steps, over `count` records."""
    per_epoch = -(-count // options.batch_size)
    steps = options.steps or max(
        1, round((options.epochs or 0) * per_epoch / options.gradient_accumulation)
    )
    return StepBatches(
        builder,
        batch_size=options.batch_size,
        steps=steps * options.gradient_accumulation,
        seed=options.seed,
        augment=options.augment,
    )


def _watched_trainer(
    model: nn.Module,
    objective: Objective,
    batches: StepBatches,
    options: TrainOptions,
    output: Path,
    evaluated: BatchLoader | None,
    callbacks: Sequence[TrainerCallback],
    show_progress: bool,
) -> tuple[Any, Watch]:
    """The trainer, and what keeps its history; the first measures what the second asks for."""
    watch = Watch(
        options,
        output / HISTORY,
        (lambda: trainer.measure(evaluated)) if evaluated else None,
        show_progress,
    )
    trainer = watch.trainer = make_trainer(
        model,
        objective=objective,
        batches=batches,
        options=options,
        output_dir=output,
        callbacks=[watch, *callbacks],
    )
    return trainer, watch


def _stop_if_asked(watch: Watch, done: int, steps: int, output: Path) -> None:
    """End the program, or raise `TrainingInterrupted`, where a signal stopped the training before its end."""
    if watch.interrupts.asked is None or done >= steps:
        return
    how = (
        f"stopped at step {done} of {steps}; checkpoint in {output}. "
        "Run the same command again to go on from there."
    )
    if watch.interrupts.asked is SIGTERM:
        logger.warning("%s", how)
        raise SystemExit(128 + SIGTERM)
    raise TrainingInterrupted(how)
