"""Retrieval: find an image's captions among all captions, and a caption's image among all images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corda_vlm.errors import DataError
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.models.finite import FiniteCheck
from corda_vlm.evaluation.scores import Outcome
from corda_vlm.evaluation.suite import Task
from corda_vlm.evaluation.tasks.base import Evaluator, TaskContext, agree_on_bad, known
from corda_vlm.evaluation.tasks.options import RETRIEVAL_METRICS as METRICS

if TYPE_CHECKING:
    from corda_vlm.data import Records


@dataclass(frozen=True)
class Retrieval(Evaluator):
    """Recall@k both ways, as CLIP_benchmark defines it.

    image -> text: the share of images with at least one of their own captions among the k nearest.
    text -> image: the share of captions whose own image is among the k nearest.

    Attributes:
        data: records with `image`, and one caption in `text` or a list of them.
        metrics: any of `METRICS`.
        captions: the column that holds all captions of an image, where `text` holds only its first.
    """

    data: Records
    metrics: Sequence[str] = METRICS
    captions: str | None = None

    def __post_init__(self) -> None:
        known(self.metrics, METRICS, "retrieval")

    @classmethod
    def build(cls, task: Task, data: Records, context: TaskContext) -> Retrieval:
        """What measures `task`; a column named as its text holds the captions."""
        column = task.data.get("text") if isinstance(task.data, Mapping) else None
        named = isinstance(column, str) and column != "auto" and "{" not in column
        return cls(data, task.metrics, column if named else None)

    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        """Yield for each metric what happened on each query.

        Raises:
            DataError: no examples, or an image without a caption.
            NotFiniteError: the model's output is NaN or Inf.
        """
        image_vectors, each = self._encoded(encoder)  # (i, d)
        captions = [caption for own in each for caption in own]
        # for each caption the index of its image
        owner = [image for image, own in enumerate(each) for _ in own]
        text_vectors = encoder.texts(captions)  # (t, d)
        image_ids, text_ids = torch.arange(len(image_vectors)), torch.tensor(owner)
        per_image = np.bincount(owner, minlength=len(image_ids))
        for metric in self.metrics:
            direction, k = metric.split("_recall@")
            if direction == "image_to_text":
                hits = recalled(image_vectors, image_ids, text_vectors, text_ids, int(k))
                chance = float(np.mean([_chance(int(m), len(text_ids), int(k)) for m in per_image]))
            else:
                hits = recalled(text_vectors, text_ids, image_vectors, image_ids, int(k))
                chance = _chance(1, len(image_ids), int(k))
            yield Outcome(metric, hits.numpy().astype(np.float64), chance=chance)

    def _encoded(self, encoder: Encoder) -> tuple[Float[Tensor, "i d"], list[list[str]]]:
        """The unit vectors of the images, and the captions of each."""
        size, step = len(self.data), encoder.batch_size

        def own() -> dict[int, tuple[Tensor, list[list[str]]]]:
            encoded: dict[int, tuple[Tensor, list[list[str]]]] = {}
            for start in range(encoder.share.rank * step, size, encoder.share.size * step):
                pixels, captions = [], []
                for index in range(start, min(start + step, size)):
                    record = self.data.get(index)
                    if record is None:  # it does not decode
                        continue
                    captions.append(self._captions(record))
                    if not captions[-1]:
                        raise DataError(
                            f"{self.data.spec}: image {index} has no caption; name its text column"
                        )
                    pixels.append(encoder.processor.image(record["image"]))
                if pixels:
                    encoded[start] = encoder.images([torch.stack(pixels)]), captions
            return encoded

        encoded = [of for _, of in sorted(encoder.together("the images", own).items())]
        agree_on_bad(self.data, encoder)
        if not encoded:
            raise DataError(f"{self.data.spec}: not one record has a picture that decodes")
        vectors = torch.cat([vectors for vectors, _ in encoded])
        return vectors, [captions for _, each in encoded for captions in each]

    def _captions(self, record: Mapping[str, Any]) -> list[str]:
        columns = ("captions", "caption") if self.captions is None else (self.captions,)
        for column in columns:
            if isinstance(captions := record.get(column), (list, tuple)):
                return [str(caption) for caption in captions]
        text = record.get("text")
        return [text] if isinstance(text, str) else [str(caption) for caption in text or ()]


def recalled(
    queries: Float[Tensor, "q d"],
    query_ids: Int[Tensor, " q"],
    candidates: Float[Tensor, "c d"],
    candidate_ids: Int[Tensor, " c"],
    k: int,
    chunk: int = 1024,
) -> Bool[Tensor, " q"]:
    """Is a candidate with the query's own id among its k most similar?

    Raises:
        NotFiniteError: a similarity is NaN or Inf, as of a model that diverged.
    """
    hits, check = [], FiniteCheck("queries")
    for at in range(
        0, len(queries), chunk
    ):  # a similarity matrix of COCO would take half a gigabyte
        similarity = queries[at : at + chunk] @ candidates.T  # (B, c)
        check(similarity)
        nearest = similarity.topk(min(k, len(candidates)), dim=1).indices  # (B, k)
        own = candidate_ids[nearest] == query_ids[at : at + chunk, None]
        hits.append(own.any(1))
    return torch.cat(hits)


def _chance(own: int, candidates: int, k: int) -> float:
    """The chance that k candidates drawn blindly contain at least one of `own`."""
    k = min(k, candidates)
    return 1.0 - math.comb(candidates - own, k) / math.comb(candidates, k)
