"""The terms that options ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from corda_vlm.data import BatchLoader, Records, make_batches
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.families.base import Processor
from corda_vlm.train.options import TrainOptions
from corda_vlm.train.terms.distill import distillation
from corda_vlm.train.terms.knowledge import RecordBatches
from corda_vlm.train.terms.options import TermOptions
from corda_vlm.train.terms.replay import replayed
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


def make_terms(
    options: TermOptions,
    model: nn.Module,
    processor: Processor,
    knowledge: KnowledgeData | None,
    training: TrainOptions,
) -> list[Term]:
    """The terms of the loss that options ask for, the anchor aside.

    Args:
        model: as it is trained, before its first step.
        knowledge: the records of those that look at such.
        training: whose seed orders them.

    Raises:
        CordaError: a term that cannot be, for this model or without knowledge.
        DataError: the records lack what a term needs.
    """
    options.check_data(knowledge is not None, "pass the knowledge's records")
    terms: list[Term] = []
    if knowledge is None:
        return terms

    def records(size: int) -> RecordBatches:
        return RecordBatches(knowledge.batches(processor, size), size, training.seed)

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
    return terms
