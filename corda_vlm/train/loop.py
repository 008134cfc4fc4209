"""One training from start, or from where it was interrupted, to its weights on disk."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from signal import SIGTERM
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback

from corda_vlm.adapter.base import base_fingerprint
from corda_vlm.adapter.folder import WEIGHTS
from corda_vlm.anchor import Anchor
from corda_vlm.data import (
    BatchBuilder,
    BatchLoader,
    Records,
    batch_builder,
    data_warnings,
    make_batches,
)
from corda_vlm.errors import CordaError, ForeignFileError, NotFiniteError
from corda_vlm.families import detect_family
from corda_vlm.families.base import Processor, unwrap
from corda_vlm.files import read_json, shown, write_json
from corda_vlm.locks import locks
from corda_vlm.options import renamed
from corda_vlm.precision import takes_bf16
from corda_vlm.run_files import BEGUN, DONE, HISTORY
from corda_vlm.train.checkpoints import STATE, last_checkpoint, step_of
from corda_vlm.train.heads import Template
from corda_vlm.train.history import read_history
from corda_vlm.train.model import as_it_was, check_anchor, check_trainable, checkpointing
from corda_vlm.train.objectives import Objective, make_objective
from corda_vlm.train.options import RESUME_SAFE_OPTIONS, TrainOptions, TrainResult
from corda_vlm.train.steps import StepBatches
from corda_vlm.train.terms.term import Penalty, Term, check_names
from corda_vlm.train.trainer import make_trainer
from corda_vlm.train.watch import Watch
from corda_vlm.train.weights import (
    all_finite,
    check_signature,
    load_weights,
    save_weights,
    signature,
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
    terms: Sequence[Term] = (),
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
        terms: further terms of the loss, built before this call; in the history by their names, unweighted.
        show_progress: a progress bar with loss, rate and throughput.

    Raises:
        NotFiniteError: the loss, a penalty or the weights became NaN or Inf: the training diverged.
        CordaError: nothing to train, `output_dir` of another training, disk full, a weight
            without an anchor or an anchor of another model.
        DataError: the data lacks what the loss needs.
        TrainingInterrupted: Ctrl-C.
    """
    output = Path(output_dir)
    options = options.complete(data.spec.format)
    options = replace(options, bf16=_bf16(options, output, model))
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
    every = [
        *_anchored(anchor, anchor_weight, anchor_every),
        *([] if extra_loss is None else [Term("extra_loss", extra_loss, extra_weight)]),
        *terms,
    ]
    check_names(every)
    plan = _plan(model, data, options, classes, templates)
    # a term that is only logged decides about no weight
    plan["terms"] = _as_json({term.name: term.plan for term in every if term.weight > 0})
    plan["base"] = base_fingerprint(model)
    _begin(output, plan, model)
    if (output / DONE).is_file():
        return _finished(output, model, objective)

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
    checkpoint = last_checkpoint(output)
    with as_it_was(model), less_memory, watch.interrupts:
        try:
            trainer.restore(checkpoint)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            watch.close()
    for warning in data_warnings(builder):
        if warning not in known:  # of an earlier training on the same records
            logger.warning("%s", warning)
    done = trainer.state.global_step
    _stop_if_asked(watch, done, trainer.state.max_steps, output)
    if not all_finite(model, objective.head):
        raise NotFiniteError(trainer._not_finite("the weights are NaN or Inf"))
    resumed = None if checkpoint is None else step_of(checkpoint)
    return _finish(output, model, objective, watch, done, resumed, base=plan["base"])


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
    if watch.interrupts.asked is SIGTERM:
        raise SystemExit(128 + SIGTERM)
    raise TrainingInterrupted(
        f"stopped at step {done} of {steps}; checkpoint in {output}. "
        "Run the same command again to go on from there."
    )


# ------------------------------------------------------------------ the folder


def _plan(
    model: nn.Module,
    data: Records,
    options: TrainOptions,
    classes: Sequence[str] | None,
    templates: Sequence[Template] | None,
) -> dict[str, Any]:
    """What a training is, as JSON: two trainings with equal plans end in equal weights."""
    plan = {
        "options": _kept(options),
        "data": data.fingerprint,
        "classes": None if classes is None else list(classes),
        "templates": None
        if templates is None
        else [t if isinstance(t, str) else t("{}") for t in templates],
        "model": signature(model),
    }
    return _as_json(plan)


def _kept(options: TrainOptions) -> dict[str, Any]:
    """The options that decide about the weights, as JSON gives them back."""
    kept = {
        name: value for name, value in asdict(options).items() if name not in RESUME_SAFE_OPTIONS
    }
    return _as_json(kept)


def _as_json(content: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(content))


def _bf16(options: TrainOptions, output: Path, model: nn.Module) -> bool:
    """Whether this training runs under bfloat16; where it is left open, what the folder's training began with."""
    former = None
    if options.bf16 == "auto" and (output / BEGUN).is_file():
        saved = read_json(output / BEGUN, "training plan")
        before = saved.get("options") if isinstance(saved, dict) else None
        if isinstance(before, dict) and isinstance(bf16 := before.get("bf16"), bool):
            former = bf16
    weight = next(model.parameters())
    return takes_bf16(options.bf16, weight.device, former=former, weights=weight.dtype)


def _anchored(anchor: Anchor | None, weight: float, every: int) -> list[Term]:
    """The anchor as a term, if there is one."""
    if anchor is None:
        return []
    return [Term("anchor", anchor, weight, every, anchor.identity)]


def _begin(output: Path, plan: dict[str, Any], model: nn.Module) -> None:
    """Write the plan, or check that the one that is there is the same."""
    path = output / BEGUN
    if not path.is_file():
        if any(output.glob(f"checkpoint-*/{STATE}")) or (output / DONE).is_file():
            raise CordaError(
                f"{output} holds a training without its {BEGUN}; choose another folder"
            )
        write_json(path, plan)
        return
    saved = read_json(path, "training plan")
    if isinstance(saved, dict):
        # trainings begun before these were noted
        saved = {"base": plan["base"], "terms": _former_terms(saved), **saved}
        saved = {key: value for key, value in saved.items() if key not in _FORMER}
    if not isinstance(saved, dict) or set(saved) != set(plan):
        raise CordaError(
            f"{path} is not a training plan of this version; delete {output} or choose another"
        )
    try:
        _compare(saved, plan, model, output)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, CordaError):
            raise
        raise ForeignFileError(
            f"{path} is damaged ({type(error).__name__}: {shown(str(error))}); delete {output} to begin anew, or give another "
            "output folder"
        ) from error


_FORMER = ("anchor", "extra_weight")


def _former_terms(saved: dict[str, Any]) -> dict[str, Any]:
    """The terms of a training that was begun when its plan named two of them only."""
    terms = {}
    if anchor := saved.get("anchor"):
        terms["anchor"] = {"every": 1, **anchor}
    if weight := saved.get("extra_weight"):
        terms["extra_loss"] = {"weight": weight, "every": 1}
    return terms


def _compare(saved: dict[str, Any], plan: dict[str, Any], model: nn.Module, output: Path) -> None:
    """Raise `CordaError` unless the training that was begun in `output` is this one."""
    # an option that there was not yet when the training began had what is its default now
    former = renamed(TrainOptions, saved["options"])
    options = {**_kept(TrainOptions(steps=1)), **former}
    changed = [
        f"{name}: {options[name]} there, {value} now"
        for name, value in plan["options"].items()
        if options[name] != value
    ]
    changed += [name for name in ("data", "classes", "templates") if saved[name] != plan[name]]
    for term in sorted({*saved["terms"], *plan["terms"]}):
        before, now = (p["terms"].get(term, {}) for p in (saved, plan))
        changed += [
            f"the {term}'s {name}: {before.get(name)} there, {now.get(name)} now"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
    if changed:
        raise CordaError(
            f"{output} holds another training ({'; '.join(changed)}); delete it to begin anew, "
            "or give another output folder"
        )
    check_signature(saved["model"], model, output)
    if saved["base"] != plan["base"]:  # what a full fine-tune begins with shows in nothing else
        raise CordaError(
            f"{output} holds the training of a model that began with other weights. Load the original model again if this "
            "one has been trained in the meantime, or give another output folder"
        )


def _finish(
    output: Path,
    model: nn.Module,
    objective: Objective,
    watch: Watch,
    steps: int,
    resumed: int | None,
    base: str,
) -> TrainResult:
    result = {
        "steps": steps,
        "seconds": round(watch.seconds, 3),
        "samples_per_second": round(watch.samples_per_second, 2),
    }
    try:
        save_weights(model, objective.head, output / WEIGHTS, base=base)
    except (OSError, SafetensorError) as error:
        raise CordaError(
            f"could not write {output / WEIGHTS}: {error}; free some space and run again"
        ) from error
    write_json(output / DONE, result)  # last: from here on the training is finished
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)
    return TrainResult(
        history=watch.history,
        weights=output / WEIGHTS,
        head=objective.head,
        resumed_from=resumed,
        **result,
    )


def _finished(output: Path, model: nn.Module, objective: Objective) -> TrainResult:
    load_weights(model, objective.head, output / WEIGHTS)
    path = output / DONE
    result = read_json(path, "training result")
    try:
        found = {name: float(result[name]) for name in ("seconds", "samples_per_second")}
        return TrainResult(
            history=read_history(output / HISTORY),
            weights=output / WEIGHTS,
            head=objective.head,
            steps=int(result["steps"]),
            resumed_from=int(result["steps"]),
            **found,
        )
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        if isinstance(error, CordaError):
            raise
        raise ForeignFileError(
            f"{path} is damaged ({type(error).__name__}: {shown(str(error))}); delete it to train again from the start"
        ) from error
