"""Distillation: on the knowledge, the model is to give what it gave before training."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from corda_vlm.errors import CordaError
from corda_vlm.families import Family, detect_family, unwrap
from corda_vlm.train.terms.features import FeatureDistillation
from corda_vlm.train.terms.knowledge import Batches, Knowledge, as_knowledge
from corda_vlm.train.terms.options import DistillLoss
from corda_vlm.train.terms.term import DataPenalty
from corda_vlm.train.terms.tokens import TokenDistillation


def distillation(
    model: nn.Module,
    batches: Batches | Knowledge,
    *,
    loss: DistillLoss = "auto",
    batch_size: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
) -> DataPenalty:
    """The distance of a model's outputs on the knowledge from what they were, as a term of the loss.

        distill = distillation(model, make_batches(knowledge, processor, batch_size=32))
        loss = task_loss + 30 * distill(step)

    Made before the first step and before a checkpoint is loaded: what the model gives now counts as no change. Of each
    record that is computed once and kept: embeddings, or the most likely of next tokens with their probabilities.

    Args:
        model: as it is trained, of any method.
        batches: of the knowledge to keep, as for `collect_covariance`; of models that generate text with labels on the
            answers (`make_batches(..., must_learn=True)`).
        loss: see `TermOptions.distill_loss`.
        batch_size, seed: see `as_knowledge`.
        cache: a folder for the outputs from before, which trainings of one model on one knowledge share.

    Raises:
        CordaError: nothing of the knowledge reaches what is trained, or a loss that is not for this model.
        DataError: the records lack what is needed.
    """
    knowledge = as_knowledge(batches, batch_size=batch_size, seed=seed)
    bare = unwrap(model)
    family = detect_family(bare)
    check_distillation(family, loss)
    folder = None if cache is None else Path(cache)
    if family.generative is not None:
        return TokenDistillation(model, knowledge, folder)
    return FeatureDistillation(model, family.need_contrastive(model), knowledge, loss, folder)


def check_distillation(family: Family, loss: DistillLoss) -> None:
    """Raise `CordaError` for a loss that compares what models of the family do not give."""
    if family.generative is not None and loss not in ("auto", "tokens"):
        raise CordaError(
            f"distillation by {loss} compares embeddings, and models of the family {family.name!r} generate text: choose the "
            "loss tokens"
        )
    if family.generative is None and loss == "tokens":
        raise CordaError(
            f"distillation by tokens is for models that generate text, and those of the family {family.name!r} give "
            "embeddings: choose the loss cosine or similarity"
        )
