"""The steps from a model and data to scores, which the verbs of the command line and the runner of experiments share.

Each takes what it needs, and knows neither an experiment nor how a run's folder is laid out. What is one call of the library
(loading a model, finding sites, attaching a plan, exporting an adapter) needs no step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from corda_vlm.adapter.folder import weights_folder
from corda_vlm.anchor import Anchor, anchor_penalty
from corda_vlm.anchor.penalty import anchor_name
from corda_vlm.covariance import CovarianceStore, GradientStore, collect_covariance
from corda_vlm.covariance.options import CalibrationOptions, CollectOptions
from corda_vlm.data import Records, data_warnings, load_records, make_batches, with_root
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.distributed.agree import made_by_first
from corda_vlm.distributed.first import locked_by_first
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.evaluation import Cache, Suite, add_result
from corda_vlm.evaluation.class_names import load_class_names, load_templates, match_class_names
from corda_vlm.evaluation.measure import (
    TaskResult,
    encoder_of,
    measure,
    tasks_with_data,
)
from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.evaluation.predictions import add_predictions
from corda_vlm.families import Loaded, Processor
from corda_vlm.families.options import SiteOptions
from corda_vlm.files import entries, file_digest, text_digest
from corda_vlm.options import as_keywords, narrowed, option_names
from corda_vlm.plan import AdapterPlan
from corda_vlm.sites import Site, find_sites, lies_in, model_fingerprint
from corda_vlm.train import Budget, TrainOptions, TrainResult, forgetting_budget, train
from corda_vlm.train.budget.unseen import check_unseen
from corda_vlm.train.folder import runs_in_bf16
from corda_vlm.train.predictors import Predictors
from corda_vlm.train.terms.make import KnowledgeData, TaskData, make_terms
from corda_vlm.train.terms.options import TermOptions
from corda_vlm.train.terms.term import Penalty, Term
from corda_vlm.train.trained import Trained

logger = logging.getLogger(__name__)


def load_data(
    spec: str | Mapping[str, Any], *, data_root: str | None = None, beside: Path | None = None
) -> Records:
    """The records of a data spec.

    Args:
        data_root: the folder that `{data_root}` in the spec stands for; None where nothing does.
        beside: the file that the spec stands in; paths may be relative to it.

    Raises:
        DataError: they cannot be read as the spec describes them.
    """
    return load_records(spec if data_root is None else with_root(spec, data_root), beside=beside)


# ------------------------------------------------------------------ covariances


def calibrate(
    loaded: Loaded,
    data: Records,
    path: str | Path,
    options: CalibrationOptions,
    *,
    modules: Sequence[str] = (),
) -> CovarianceStore:
    """Collect the covariances of the inputs of a model's sites over data, or go on with them, or read finished ones.

    The batches hold what the towers need, which is part of what identifies the data.

    Args:
        path: the file that they are written to.
        modules: those of a language model that are trained whole: the sites that they are or hold are looked at too.

    Raises:
        UnknownNameError: an unknown tower or role.
        DataError: the data lacks what a tower needs.
        CordaError: what `collect_covariance` raises.
    """
    sites = calibrated_sites(loaded, options, modules)
    batches = make_batches(
        data,
        loaded.processor,
        batch_size=options.batch_size,
        shuffle=True,
        seed=options.seed,
        limit=options.samples,
        towers=options.towers,
        chat=narrowed(options, ChatOptions),
    )
    chosen = {**as_keywords(options, CollectOptions), **dict.fromkeys(option_names(SiteOptions))}
    store = collect_covariance(loaded.model, batches, sites, path=path, **chosen)
    for warning in data_warnings(batches.builder):
        logger.warning(warning)
    return store


def calibrated_sites(
    loaded: Loaded, options: SiteOptions, modules: Sequence[str] = ()
) -> list[Site]:
    """The sites of the chosen towers and roles, and of a language model those in `modules` besides.

    The batches for one tower of a CLIP do not reach another, so that what lies there is not looked at.
    """
    chosen = find_sites(loaded.model, **as_keywords(options, SiteOptions))
    if not modules or loaded.family.generative is None:
        return chosen
    return [s for s in find_sites(loaded.model) if s in chosen or lies_in(s.name, modules)]


# ------------------------------------------------------------------ plans


def write_plan(path: str | Path, make: Callable[[], AdapterPlan]) -> AdapterPlan:
    """Make a plan and write it to a file, which no other run may write meanwhile; of several processes the first writes."""
    with locked_by_first(path):
        plan = make()
        made_by_first("the plan's file", lambda: plan.save(path))
    return plan


def load_or_write_plan(
    path: Path,
    make: Callable[[], AdapterPlan],
    *,
    model: nn.Module,
    store: CovarianceStore | None,
    task: CovarianceStore | GradientStore | None,
) -> AdapterPlan:
    """The plan in a file, or where there is none yet the one that is made and written there.

    Args:
        model: the bare model that it is for.
        store: the covariances that it would be made of, if it takes any.
        task: the covariances, or the gradient, of the new task that it would be made of besides, if it takes any.

    Raises:
        ForeignFileError: the plan was made for another model or of other covariances.
    """
    if not path.is_file():
        return write_plan(path, make)
    plan = AdapterPlan.load(path, model=model)
    if plan.budget is not None and plan.rank_rule is None:
        task = None  # of a version whose ranks looked at no task
    made_from = ((store, plan.data_fingerprint), (task, plan.task_fingerprint))
    if any(given is not None and given.data_fingerprint != made for given, made in made_from):
        raise ForeignFileError(
            f"{path} was made from other covariances, or another gradient, than these; delete it, or run with --fresh"
        )
    return plan


# ------------------------------------------------------------------ training


def training_prompts(
    data: Records,
    classes: Sequence[str] | str | None,
    templates: Sequence[str] | str | None,
    *,
    beside: Path | None = None,
) -> tuple[Sequence[str] | None, Sequence[str] | None]:
    """Class names in the order of the data's labels, and templates; None for those that a training takes by itself.

    Args:
        classes: names, or the name of a file in eval/class_names or its path.
        templates: prompts with `{}` for the name, or the name of a file in eval/templates or its path.
        beside: the file that says so; paths may be relative to it.

    Raises:
        UnknownNameError: no such file.
        DataError: another number of names than the data has classes.
    """
    names = None
    if classes is not None:
        wanted = load_class_names(classes, beside) if isinstance(classes, str) else classes
        matched = match_class_names(wanted, data.class_names, what="the task's data")
        order = range(len(matched.names)) if matched.remap is None else matched.remap
        names = [matched.names[index] for index in order]
    return names, templates and load_templates(templates, beside)


def train_anchored(
    model: nn.Module,
    data: Records,
    processor: Processor,
    *,
    options: TrainOptions,
    output_dir: str | Path,
    classes: Sequence[str] | None,
    templates: Sequence[str] | None,
    knowledge: CovarianceStore | None,
    terms: TermOptions,
    knowledge_data: KnowledgeData | None = None,
    task: CovarianceStore | None = None,
    probe: Records | None = None,
    extra_loss: Penalty | None = None,
    predict: bool = False,
) -> tuple[TrainResult, dict[str, float]]:
    """Train a model that is prepared, and say how much it changed its outputs on the knowledge.

    Args:
        model, data, processor, options, output_dir, classes, templates: as in `corda_vlm.train.train`.
        knowledge: covariances of the knowledge to keep; None trains without an anchor and predicts nothing.
        terms: what else the loss holds; with an anchor of 0 that is the forecast of forgetting alone.
        knowledge_data: records of the knowledge, for the terms that look at such.
        task: covariances of the new task, for an anchor of that metric.
        probe: the records that tell what is kept, where `terms` has a budget; None holds out some of `knowledge_data`.
        extra_loss: the method's own term of the loss, `Prepared.penalty`.
        predict: take the other predictors of forgetting too, not the forecast alone.

    Returns:
        what training tells, and the predictors of forgetting at its end, see `Predictors.now`.

    Raises:
        NotFiniteError: the training diverged, or a predictor of forgetting is NaN or Inf.
        CordaError: what `train`, `anchor_penalty` and `make_terms` raise.
    """
    forecaster = None if knowledge is None else anchor_penalty(model, knowledge)
    predictors = None if forecaster is None else Predictors(forecaster)
    learned = TaskData(data, options, classes, templates)
    if predict and predictors is not None:
        predictors.look_at(model, processor, learned, task)
    budget = None
    if terms.keep is not None:
        terms = terms.with_budget(
            has_data=knowledge_data is not None,
            has_store=knowledge is not None,
            output_side=knowledge is not None and knowledge.outputs is not None,
        )
        knowledge_data, drawn = probed(terms, knowledge_data, probe, data)
        budget = _budget(model, processor, terms, knowledge_data, drawn, options, output_dir)
    terms, options = terms.shared(options)
    # at once: what the model is now counts as no change
    metric = terms.anchor and not terms.forecasts
    further = [_anchor_term(model, terms, knowledge, task, forecaster)] if metric else []

    def others() -> list[Term]:
        return [*make_terms(terms, model, processor, knowledge_data, learned), *further]

    result = train(
        model,
        data,
        processor,
        options=options,
        output_dir=output_dir,
        classes=classes,
        templates=templates,
        anchor=forecaster,
        anchor_weight=terms.anchor if terms.forecasts else 0.0,
        anchor_every=terms.anchor_every,
        extra_loss=extra_loss,
        terms=others,
        budget=budget,
    )
    return result, {} if predictors is None else predictors.now()


def probed(
    terms: TermOptions, knowledge: KnowledgeData | None, probe: Records | None, task: Records
) -> tuple[KnowledgeData | None, Records]:
    """The records that terms look at, and those of the probe.

    Args:
        terms: of `with_budget`.
        probe: to draw from; None holds some of the knowledge out.
        task: what is learned.

    Raises:
        CordaError: no records for the probe, or such as are trained on.
    """
    if probe is not None:
        chosen = np.random.RandomState(0).permutation(len(probe))[: terms.probe_records]
        drawn = probe.select(chosen)
        check_unseen(drawn, knowledge if terms.needs_data else None, task, probe)
        return knowledge, drawn
    if knowledge is None:
        raise CordaError(
            "keep is told by records of the knowledge that nothing trains on, and there are none: name the knowledge's records, or "
            "those of a probe"
        )
    every = knowledge.records
    knowledge, drawn = knowledge.hold_out(terms.probe_records)
    check_unseen(drawn, knowledge, task, every)
    return knowledge, drawn


def _budget(
    model: nn.Module,
    processor: Processor,
    terms: TermOptions,
    knowledge: KnowledgeData | None,
    probe: Records,
    options: TrainOptions,
    output_dir: str | Path,
) -> Budget:
    """The budget that options ask for."""
    assert terms.keep is not None
    term = terms.steered
    if term == "anchor":
        term = anchor_name(terms.anchor_metric, terms.anchor_output)
    return forgetting_budget(
        model,
        probe,
        terms.keep,
        processor=processor,
        term=term,
        stop=terms.keep_by == "stop",
        every=terms.keep_every,
        metric=terms.keep_metric,
        classes=None if knowledge is None else knowledge.records.class_names,
        templates=terms.probe_templates,
        bf16=runs_in_bf16(options, Path(output_dir), model),
        chat=narrowed(options, ChatOptions) if knowledge is None else knowledge.chat,
    )


def _anchor_term(
    model: nn.Module,
    terms: TermOptions,
    knowledge: CovarianceStore | None,
    task: CovarianceStore | None,
    forecaster: Anchor | None,
) -> Term:
    """The anchor of another metric than that of the forecast, which stays in the history beside it."""
    anchor = anchor_penalty(
        model,
        knowledge,
        metric=terms.anchor_metric,
        output_side=terms.anchor_output,
        task_store=task,
        beside=forecaster,
    )
    return Term(anchor.name, anchor, terms.anchor, terms.anchor_every, anchor.identity)


# ------------------------------------------------------------------ measuring


def measure_into(
    scores: str | Path | None,
    trained: Trained,
    suite: Suite,
    options: EvalOptions,
    *,
    scale: float,
    about: Mapping[str, Any],
    processor: Processor,
    cache: Cache,
    made_from: Mapping[str, str] = MappingProxyType({}),
    predictions: str | Path | None = None,
) -> Iterator[tuple[TaskResult, list[dict[str, Any]]]]:
    """Measure a model at one strength, task by task, and add what was measured to a file of scores.

    Args:
        scores: the file; None writes nothing.
        trained: the model; `Trained(model)` for one before training.
        scale: strength of what was trained.
        about: which model it is, as in `score_row`: run, method, and what else its rows tell.
        processor, cache: as in `evaluate`.
        made_from: task -> what its scores are made from, which their rows then tell.
        predictions: a file to add to what the model said of each example; None writes none.

    Yields:
        each task's result, with the rows of scores that were added, none where the file had them already.

    Raises:
        CordaError: what `measure` and `add_result` raise.
    """
    with trained.at_scale(scale) as head:
        encoder = encoder_of(trained.model, options, processor=processor, cache=cache)
        for result in measure(
            encoder, suite, options, head=head, show_progress=True, predict=predictions is not None
        ):
            facts = {**about, "scale": scale}
            if result.task.name in made_from:
                facts["made_from"] = made_from[result.task.name]
            write = partial(_add_result, scores, predictions, result, facts)
            yield result, made_by_first("the scores", write) or []


def _add_result(
    scores: str | Path | None,
    predictions: str | Path | None,
    result: TaskResult,
    facts: Mapping[str, Any],
) -> list[dict[str, Any]]:
    if predictions is not None:  # first, so that a kill in between has the task measured again
        add_predictions(predictions, result, **facts)
    return [] if scores is None else add_result(scores, result, **facts)


def measured_from(
    loaded: Loaded, adapter: str | Path | None, suite: Suite, options: EvalOptions, cache: Cache
) -> dict[str, str]:
    """For each task that is to be measured what its scores are made from, so that the same is not measured twice.

    Args:
        loaded: the model before training.
        adapter: the training's folder; None for the model itself.

    Raises:
        UnknownNameError, DataError: as `tasks_with_data`.
    """
    files = [] if adapter is None else sorted(entries(weights_folder(adapter)))
    weights = [file_digest(file) for file in files if file.suffix in (".json", ".safetensors")]
    dtype = next(loaded.model.parameters()).dtype
    model = [model_fingerprint(loaded.model, loaded.family), str(dtype), *weights]
    how = [options.limit, options.bf16, options.resamples]
    return {
        task.name: text_digest(json.dumps([model, how, task.digest, data.fingerprint]))
        for task, data in tasks_with_data(suite, options, cache, limit=options.limit)
    }
