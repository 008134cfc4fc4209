"""Zero-shot classification: an image belongs to the class whose prompts lie nearest to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from corda_vlm.errors import CordaError, DataError
from corda_vlm.evaluation.class_names import (
    OPENAI,
    ClassNames,
    load_class_names,
    load_templates,
    match_class_names,
)
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.models.finite import FiniteCheck
from corda_vlm.evaluation.scores import Outcome
from corda_vlm.evaluation.suite import Task, check_keys
from corda_vlm.evaluation.tasks.base import (
    Evaluator,
    TaskContext,
    agree_on_bad,
    known,
    registered,
    shares,
)
from corda_vlm.evaluation.tasks.options import ZERO_SHOT_METRICS as METRICS

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
        own = registered(self.metrics, "zero_shot")
        known(self.metrics, [*METRICS, *own], "zero-shot")

    @classmethod
    def build(cls, task: Task, data: Records, context: TaskContext) -> ZeroShot:
        """What measures `task`, with the class names and templates that it names."""
        assert task.templates is not None, "a suite refuses a zero-shot task without templates"
        classes = class_names_of(task, data, context)
        templates = load_templates(task.templates, task.source)
        return cls(data, classes.names, templates, task.metrics, classes.remap)

    def with_head(self, head: Callable[[Tensor], Tensor]) -> ZeroShot:
        """The same images judged by a trained classifier in place of the prompts."""
        return replace(self, head=head)

    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        """Yield for each metric what happened on each example.

        Raises:
            DataError: no examples, or a label that no class name answers to.
            NotFiniteError: the model's output is NaN or Inf.
        """
        vectors, truth = self._encoded(encoder)  # (n, d), (n,)
        classify = self.head or self._prompts(encoder)
        own = registered(self.metrics, "zero_shot")
        judges = [_ranks_of, _first_of, *(metric.judge for metric in own.values())]
        chunk = max(encoder.batch_size, 256)
        ranks, firsts, *others = _judged(vectors, classify, truth, chunk, judges)
        rank = torch.cat(ranks).numpy()
        values = {
            metric: np.concatenate(
                [shares(metric, part, len(ranks[n])) for n, part in enumerate(parts)]
            )
            for metric, parts in zip(own, others, strict=True)
        }
        self._note_each(encoder, torch.cat(firsts), truth)
        classes = len(self.class_names)
        for metric in self.metrics:
            if metric in own:
                yield Outcome(metric, values[metric], chance=own[metric].chance)
                continue
            k = min(5, classes) if metric == "top5" else 1
            groups = truth.numpy() if metric == "mean_per_class" else None
            yield Outcome(metric, (rank < k).astype(np.float64), groups, chance=k / classes)

    def _encoded(self, encoder: Encoder) -> tuple[Tensor, Tensor]:
        """The unit vectors (n, d) of the images, and the index (n,) of each one's class."""
        from corda_vlm.data import make_batches

        if self.data.labels is None:
            raise DataError(
                f"{self.data.spec}: has no labels to classify by; name its label column"
            )
        batches = make_batches(
            self.data, encoder.processor, batch_size=encoder.batch_size, towers="vision",
            workers=encoder.workers,
        )  # fmt: skip

        def own() -> dict[int, tuple[Tensor, Tensor]]:
            encoded: dict[int, tuple[Tensor, Tensor]] = {}
            for number in range(encoder.share.rank, len(batches), encoder.share.size):
                if batch := batches.batch_at(number):
                    encoded[number] = encoder.images([batch["pixel_values"]]), batch["labels"]
            return encoded

        encoded = dict(sorted(encoder.together("the images", own).items()))
        agree_on_bad(self.data, encoder)
        if not encoded:
            next(iter(batches))  # raises
        vectors, truth = (torch.cat(parts) for parts in zip(*encoded.values(), strict=True))
        if self.remap is not None and self.head is None:
            truth = torch.tensor(self.remap)[truth]
        if int(truth.max()) >= len(self.class_names):
            raise DataError(
                f"{self.data.spec}: has a label {int(truth.max())}, but there are {len(self.class_names)} class "
                "names; name every class of the data"
            )
        return vectors, truth

    def _note_each(
        self, encoder: Encoder, firsts: Int[Tensor, " n"], truth: Int[Tensor, " n"]
    ) -> None:
        if encoder.heard is None:
            return
        names = self.class_names if self.head is None else self.data.class_names
        names = names or [str(label) for label in range(len(self.class_names))]
        measured = [index for index in range(len(self.data)) if index not in self.data.bad]
        each = zip(measured, firsts.tolist(), truth.tolist(), strict=True)
        for index, first, label in each:
            said, right = str(names[first]), str(names[label])
            self.note(encoder, index, said, [right], first == label, "top1")

    def _prompts(self, encoder: Encoder) -> Callable[[Tensor], Tensor]:
        weights = encoder.classifier(self.class_names, self.templates)  # (d, classes)
        return lambda vectors: vectors @ weights


def _judged(
    vectors: Float[Tensor, "n d"],
    classify: Callable[[Tensor], Tensor],
    truth: Int[Tensor, " n"],
    chunk: int,
    judges: Sequence[Callable[[Tensor, Tensor], Any]],
) -> list[list[Any]]:
    """For each of `judges` what it says of (logits (b, classes), labels (b,)), chunk by chunk.

    Raises:
        NotFiniteError: a similarity, or a trained head's output, is NaN or Inf.
    """
    said: list[list[Any]] = [[] for _ in judges]
    check = FiniteCheck("images")
    for at in range(0, len(vectors), chunk):
        logits = classify(vectors[at : at + chunk])  # (b, classes)
        check(logits)
        for judge, values in zip(judges, said, strict=True):
            values.append(judge(logits, truth[at : at + chunk]))
    return said


def _ranks_of(logits: Float[Tensor, "b c"], labels: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """(b,) how many classes are ranked before the true one, in the order `topk` gives.

    A collapsed model makes every class equal; among equals the lower index comes first, so that it
    scores at chance.
    """
    label = labels[:, None]
    own = logits.gather(1, label)
    earlier = torch.arange(logits.shape[1]) < label
    return ((logits > own) | ((logits == own) & earlier)).sum(1)


def _first_of(logits: Float[Tensor, "b c"], labels: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """(b,) the class that is ranked first; of equals that of the lower index, as in `_ranks_of`."""
    return logits.argmax(1)


def class_names_of(task: Task, data: Any, context: TaskContext) -> ClassNames:
    """The class names of a task as its prompts say them, and which of them each label of the data is.

    Raises:
        DataError: the records that should name them do not, or they are not those of the data.
        CordaError: they are described wrongly, or there is none.
    """
    what = context.what
    classes: Any = task.classes
    options = dict(classes) if isinstance(classes, Mapping) else {}
    if options:
        check_keys(options, ("from", "names", "count"), (), f"classes of {what}")
        if ("from" in options) == ("names" in options):
            raise CordaError(f"classes of {what}: give either 'from' or 'names'")
        classes = options.get("names")
    count = options.get("count")
    if "from" in options:
        named_by = options["from"]
        other = data if named_by == "data" else context.load(named_by, task.source)
        if not other.class_names:
            raise DataError(
                f"{what}: classes are to come from {named_by!r}, which names no classes"
            )
        classes = {name: name for name in map(str, other.class_names)}
    # ImageNet's order is that of its sorted synset ids, under whatever names the data has its classes.
    in_order = classes == OPENAI
    if isinstance(classes, str):
        classes = load_class_names(classes, task.source)
    if not classes:
        raise CordaError(f"{what}: no class names")
    return match_class_names(classes, data.class_names, count=count, in_order=in_order, what=what)
