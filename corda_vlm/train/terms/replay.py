"""Replay: the knowledge's own loss beside that of the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.data import Records
from corda_vlm.errors import DataError
from corda_vlm.families import detect_family, unwrap
from corda_vlm.families.base import Family, Processor, device_of, on_device
from corda_vlm.train.heads import Template
from corda_vlm.train.objectives import Objective, make_objective
from corda_vlm.train.options import Loss, TrainOptions
from corda_vlm.train.terms.knowledge import Knowledge, RecordBatches
from corda_vlm.train.terms.options import ReplayLoss, TermOptions
from corda_vlm.train.terms.teacher import steady
from corda_vlm.train.terms.term import DataPenalty


class Replay(DataPenalty):
    """The loss of an objective on batches of the knowledge."""

    def __init__(
        self, model: nn.Module, knowledge: Knowledge, objective: Objective, said: dict[str, Any]
    ) -> None:
        self.model, self.knowledge, self.objective, self._said = model, knowledge, objective, said

    @property
    def identity(self) -> dict[str, Any]:
        return {**self._said, **self.knowledge.identity}

    def __call__(self, number: int) -> Float[Tensor, ""]:
        _, batch = self.knowledge.at(number)
        with steady(self.model):
            loss, _ = self.objective(unwrap(self.model), on_device(batch, device_of(self.model)))
        return loss


def replayed(
    model: nn.Module,
    knowledge: RecordBatches,
    processor: Processor,
    *,
    loss: ReplayLoss = "auto",
    classes: Sequence[str] | None = None,
    templates: Sequence[Template] | None = TermOptions.replay_templates,
) -> Replay:
    """The loss of the knowledge's own records, as a term of the loss.

    Args:
        knowledge: of `as_knowledge(make_batches(...))`.
        loss: see `TermOptions.replay_loss`.
        classes: names for the prompts; None takes the data's own.
        templates: prompts with `{}` for the name; None those of `train`.

    Raises:
        DataError: the records lack what the loss needs.
        CordaError: prompts that cannot be built.
    """
    family, data = detect_family(unwrap(model)), knowledge.data
    chosen = replay_loss_for(family, data, loss)
    size = int(knowledge.identity["batch_size"])
    options = TrainOptions(loss=chosen, steps=1, batch_size=size)
    objective = make_objective(options, model, family, processor, data, classes, templates)
    said: dict[str, Any] = {"loss": chosen}
    if chosen == "prompt":
        said["classes"] = None if classes is None else list(classes)
        said["templates"] = [t if isinstance(t, str) else t("{}") for t in templates or ()]
    return Replay(model, knowledge, objective, said)


def replay_loss_for(family: Family, data: Records, loss: ReplayLoss) -> Loss:
    """The loss that records are replayed by.

    Raises:
        DataError: the records lack what it needs, or it is not for models of this family.
    """
    labeled = data.labels is not None and data.class_names is not None
    if loss == "auto":
        if family.generative is not None:
            return "next_token"
        if not labeled and data.texts is None:
            raise DataError(
                f"{data.spec}: replay learns the knowledge's own labels or texts, and its records have neither; name their "
                "column with label: or text:, or take distill, which needs pictures alone"
            )
        return "prompt" if labeled else "contrastive"
    if (loss == "next_token") != (family.generative is not None):
        raise DataError(
            f"{data.spec}: replay by the {loss} loss is not for models of the family {family.name!r}; leave replay_loss out"
        )
    lacks = {"prompt": not labeled, "contrastive": data.texts is None}
    if lacks.get(loss):
        missing = "labels" if loss == "prompt" else "texts"
        raise DataError(
            f"{data.spec}: replay by the {loss} loss needs {missing}, and the records of the knowledge have none; name their "
            f"column with {missing.removesuffix('s')}:, or take distill, which needs pictures alone"
        )
    return loss
