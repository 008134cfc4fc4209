"""The gradient of a training's own loss, before its first step: what methods start from that look at the new task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from corda_vlm.covariance import GradientStore, collect_gradient
from corda_vlm.data import Records, make_batches
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.families import Batch, detect_family
from corda_vlm.families.base import Processor
from corda_vlm.families.options import SiteOptions
from corda_vlm.options import as_keywords, narrowed
from corda_vlm.train.heads import Template
from corda_vlm.train.objectives import Objective, make_objective, towers_of
from corda_vlm.train.options import LossOptions, TaskGradientOptions, TrainOptions


def task_gradient(
    model: nn.Module,
    data: Records,
    processor: Processor,
    *,
    options: TaskGradientOptions,
    classes: Sequence[str] | None = None,
    templates: Sequence[Template] | None = None,
    path: str | Path | None = None,
    show_progress: bool = True,
) -> GradientStore:
    """The mean gradient of the loss that `train` would minimize, at the model as it is.

    Args:
        model: bare.
        data, processor, classes, templates: as of `train`.
        options: which loss, on how many records, of which weights; a loss that is left open is the data's.
        path: as of `collect_gradient`.

    Raises:
        DataError: the data lacks what the loss needs.
        CordaError: what `collect_gradient` raises.
    """
    loss = options.loss_for(data.spec.format)
    asked = TrainOptions(
        **{**as_keywords(options, LossOptions), "loss": loss}, batch_size=options.batch_size
    )

    def made() -> Objective:
        return make_objective(
            asked, model, detect_family(model), processor, data, classes, templates
        )

    batches = make_batches(
        data,
        processor,
        batch_size=options.batch_size,
        shuffle=True,
        seed=options.seed,
        limit=options.batches * options.batch_size,
        towers=towers_of(asked.loss),
        chat=narrowed(options, ChatOptions),
        must_learn=True,
    )
    names = None if templates is None else [t if isinstance(t, str) else t("{}") for t in templates]
    about = json.dumps([as_keywords(asked, LossOptions), classes and list(classes), names])
    return collect_gradient(
        model,
        batches,
        _OnceMade(made),
        about=hashlib.sha256(about.encode()).hexdigest()[:16],
        path=path,
        show_progress=show_progress,
        **as_keywords(options, SiteOptions),
    )


class _OnceMade:
    """A loss that is made at its first batch, when only the weights in question take gradients.

    So the class vectors of a text tower that is not looked at are computed once.
    """

    def __init__(self, make: Callable[[], Objective]) -> None:
        self._make = make
        self._objective: Objective | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self._objective is None:
            self._objective = self._make()
        return self._objective(model, batch)[0]
