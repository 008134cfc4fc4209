"""Zero-shot classification: an image belongs to the class whose prompts lie nearest to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from corda_vlm.errors import DataError
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.models.finite import FiniteCheck
from corda_vlm.evaluation.scores import Outcome
from corda_vlm.evaluation.tasks.base import Evaluator, known
from corda_vlm.evaluation.tasks.registry import ZERO_SHOT_METRICS as METRICS

if TYPE_CHECKING:
    from corda_vlm.data import Records


@dataclass(frozen=True)
class ZeroShot(Evaluator):
    """Classification by prompts of the class names, or by a trained head.

    Attributes:
        data: images with labels.
        class_names: the names as the prompts say them, in the order of the labels.
        templates: prompts with one `{}` each.
        remap: for each label of the data its index in `class_names`, where the two are not the same.
        metrics: any of `METRICS`. mean_per_class is the mean over classes of each class's top-1 recall.
        head: image embeddings (b, d) -> logits (b, classes) in the order of the data's labels, in place of the prompts.
    """

    data: Records
    class_names: Sequence[str]
    templates: Sequence[str]
    metrics: Sequence[str] = ("top1",)
    remap: Sequence[int] | None = None
    head: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        known(self.metrics, METRICS, "zero-shot")

    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        """Yield for each metric what happened on each example.

        Raises:
            DataError: no examples, or a label that no class name answers to.
            NotFiniteError: the model's output is NaN or Inf.
        """
        from corda_vlm.data import make_batches

        if self.data.labels is None:
            raise DataError(
                f"{self.data.spec}: has no labels to classify by; name its label column"
            )
        labels: list[Tensor] = []

        def pixels() -> Iterator[Tensor]:
            for batch in make_batches(
                self.data, encoder.processor, batch_size=encoder.batch_size, towers="vision",
                workers=encoder.workers,
            ):  # fmt: skip
                labels.append(batch["labels"])
                yield batch["pixel_values"]

        vectors = encoder.images(pixels())  # (n, d)
        truth = torch.cat(labels)  # (n,)
        if self.remap is not None and self.head is None:
            truth = torch.tensor(self.remap)[truth]
        if int(truth.max()) >= len(self.class_names):
            raise DataError(
                f"{self.data.spec}: has a label {int(truth.max())}, but there are {len(self.class_names)} class "
                "names; name every class of the data"
            )
        classify = self.head or self._prompts(encoder)
        rank = _ranks(vectors, classify, truth, chunk=max(encoder.batch_size, 256)).numpy()
        classes = len(self.class_names)
        for metric in self.metrics:
            k = min(5, classes) if metric == "top5" else 1
            groups = truth.numpy() if metric == "mean_per_class" else None
            yield Outcome(metric, (rank < k).astype(np.float64), groups, chance=k / classes)

    def _prompts(self, encoder: Encoder) -> Callable[[Tensor], Tensor]:
        weights = encoder.classifier(self.class_names, self.templates)  # (d, classes)
        return lambda vectors: vectors @ weights


def _ranks(
    vectors: Float[Tensor, "n d"],
    classify: Callable[[Tensor], Tensor],
    truth: Int[Tensor, " n"],
    chunk: int,
) -> Int[Tensor, " n"]:
    """(n,) how many classes are ranked before the true one, in the order `topk` gives.

    A collapsed model makes every class equal; among equals the lower index comes first, so that it
    scores at chance.

    Raises:
        NotFiniteError: a similarity, or a trained head's output, is NaN or Inf.
    """
    found, check = [], FiniteCheck("images")
    for at in range(0, len(vectors), chunk):
        logits = classify(vectors[at : at + chunk])  # (B, classes)
        check(logits)
        label = truth[at : at + chunk, None]
        own = logits.gather(1, label)
        earlier = torch.arange(logits.shape[1]) < label
        found.append(((logits > own) | ((logits == own) & earlier)).sum(1))
    return torch.cat(found)
