"""The terms that options ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import nn

from corda_vlm.covariance.options import CalibrationOptions
from corda_vlm.data import BatchLoader, Records, make_batches
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.errors import CordaError
from corda_vlm.families import Family, detect_family, unwrap
from corda_vlm.families.base import Processor
from corda_vlm.options import narrowed
from corda_vlm.train.heads import Template
from corda_vlm.train.objectives import make_objective
from corda_vlm.train.options import TrainOptions
from corda_vlm.train.terms.distill import check_distillation, distillation
from corda_vlm.train.terms.ewc import consolidation
from corda_vlm.train.terms.kl_new import NewTaskDivergence
from corda_vlm.train.terms.knowledge import RecordBatches
from corda_vlm.train.terms.options import TermOptions
from corda_vlm.train.terms.replay import replay_loss_for, replayed
from corda_vlm.train.terms.start_decay import StartDecay, StartPull
from corda_vlm.train.terms.term import Term


@dataclass(frozen=True)
class KnowledgeData:
    """Records of the knowledge to keep, for a training that looks at them.

    Attributes:
        records: all that there are.
        samples: at most so many of them, drawn at random: for the same `seed` those that covariances are collected of.
        seed: of the draw.
        chat: how conversations become tokens.
        cache: folder for what the model gave before training; None keeps it in memory alone.
    """

    records: Records
    samples: int | None = None
    seed: int = 0
    chat: ChatOptions = field(default_factory=ChatOptions)
    cache: Path | None = None

    def hold_out(self, count: int) -> tuple[KnowledgeData, Records]:
        """Up to `count` records that no term looks at, and the knowledge without them.

        They are those that the draw leaves, which covariances do not look at either. Where it leaves too few it leaves
        a quarter of all, and the terms get fewer; covariances of the same draw have then seen some of them.
        """
        every = len(self.records)
        drawn = every if self.samples is None else min(self.samples, every)
        held = min(count, max(every - drawn, every // 4))
        samples = min(drawn, every - held)
        order = np.random.RandomState(self.seed).permutation(every)  # as make_batches draws
        return replace(self, samples=samples), self.records.select(order[samples : samples + held])

    @property
    def looked_at(self) -> Records:
        """Those that terms look at."""
        order = np.random.RandomState(self.seed).permutation(len(self.records))
        return self.records.select(order[: self.samples])

    def batches(self, processor: Processor, batch_size: int) -> BatchLoader:
        return make_batches(
            self.records,
            processor,
            batch_size=batch_size,
            shuffle=True,
            seed=self.seed,
            limit=self.samples,
            chat=self.chat,
            must_learn=True,
        )


@dataclass(frozen=True)
class TaskData:
    """What the training learns, and how; the fields as of `train`."""

    records: Records
    options: TrainOptions
    classes: Sequence[str] | None = None
    templates: Sequence[Template] | None = None


def make_terms(
    options: TermOptions,
    model: nn.Module,
    processor: Processor,
    knowledge: KnowledgeData | None,
    task: TaskData,
) -> list[Term]:
    """The terms of the loss that options ask for, the anchor aside.

    Args:
        model: as it is trained, before its first step.
        knowledge: the records of those that look at such.
        task: what is trained on; its seed orders the records of the knowledge. With a share of replay the training itself
            takes the options of `TermOptions.shared`.

    Raises:
        CordaError: a term that cannot be, for this model or without knowledge.
        DataError: the records lack what a term needs.
    """
    if not options.names:
        return []
    options.check_data(knowledge is not None, "pass the knowledge's records")
    training = task.options.complete(task.records.spec.format)
    options.check_training(training, training.loss)
    options, training = options.shared(training)
    terms = (
        []
        if knowledge is None
        else _of_knowledge(options, model, processor, knowledge, training.seed)
    )
    if options.kl_new > 0:
        family = detect_family(unwrap(model))
        objective = make_objective(
            training, model, family, processor, task.records, task.classes, task.templates
        )
        near = NewTaskDivergence(model, objective)
        terms.append(Term("kl_new", near, options.kl_new, options.kl_new_every))
    if options.start_decay > 0:
        decay = (StartPull if options.start_decay_kind == "decoupled" else StartDecay)(model)
        said = {"kind": options.start_decay_kind}
        terms.append(Term("start_decay", decay, options.start_decay, identity=said))
    return terms


def held_to(
    knowledge: Records | KnowledgeData,
    model: nn.Module,
    processor: Processor,
    task: TaskData,
    folder: Path,
) -> list[Term]:
    """The terms of a training that is given records of the knowledge, and nothing else is said of them: distillation.

    Args:
        folder: keeps what the model gave before training, where the knowledge names no folder.

    Raises:
        CordaError, DataError: as `make_terms`.
    """
    # conversations are read as those of the task are
    known = known_of(knowledge, folder, narrowed(task.options, ChatOptions))
    assert known is not None
    distilled = TermOptions().with_data()
    check_terms(distilled, detect_family(unwrap(model)), known.records)
    return make_terms(distilled, model, processor, known, task)


def known_of(
    knowledge: Records | KnowledgeData | None,
    folder: Path | None = None,
    chat: ChatOptions | None = None,
) -> KnowledgeData | None:
    """The records of the knowledge as terms look at them: of plain ones as many as `calibrate` draws."""
    if knowledge is None or isinstance(knowledge, KnowledgeData):
        return knowledge
    return KnowledgeData(
        knowledge, CalibrationOptions.samples, chat=chat or ChatOptions(), cache=folder
    )


def check_terms(options: TermOptions, family: Family, records: Records, where: str = "") -> None:
    """Raise what can be told of the knowledge's records before a model is prepared.

    Args:
        where: begins the message.

    Raises:
        CordaError: a term that is not for models of this family, or records that lack what a term needs.
    """
    try:
        if options.distill > 0:
            check_distillation(family, options.distill_loss)
        if "replay" in options.needs_data:
            replay_loss_for(family, records, options.replay_loss)
    except CordaError as error:
        raise CordaError(f"{where}{error}") from None


def _of_knowledge(
    options: TermOptions,
    model: nn.Module,
    processor: Processor,
    knowledge: KnowledgeData,
    seed: int,
) -> list[Term]:
    """Those that look at its records."""

    def records(size: int) -> RecordBatches:
        return RecordBatches(knowledge.batches(processor, size), size, seed)

    terms = []
    if options.distill > 0:
        distill = distillation(
            model,
            records(options.distill_batch_size),
            loss=options.distill_loss,
            cache=knowledge.cache,
        )
        terms.append(Term("distill", distill, options.distill, options.distill_every))
    if options.replay > 0:
        again = replayed(
            model,
            records(options.replay_batch_size),
            processor,
            loss=options.replay_loss,
            templates=options.replay_templates,
        )
        terms.append(Term("replay", again, options.replay, options.replay_every))
    if options.ewc > 0:
        ewc = consolidation(model, records(_OF_A_SQUARE), cache=knowledge.cache)
        terms.append(Term("ewc", ewc, options.ewc, options.ewc_every, ewc.identity))
    return terms


_OF_A_SQUARE = 4
"""Records whose gradients are squared together: one by one is best and slowest."""
