"""The probe of a forgetting budget: records that nothing trains on, and what the model makes of each."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.data import Records
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.errors import CordaError, DataError
from corda_vlm.evaluation.class_names import ClassNames, load_templates, match_class_names
from corda_vlm.evaluation.models.base import MeasuredModel
from corda_vlm.evaluation.models.encoder import Cache, Encoder
from corda_vlm.evaluation.tasks.zero_shot import ZeroShot
from corda_vlm.families import Family, detect_family, unwrap
from corda_vlm.families.base import Processor, on_device
from corda_vlm.families.generative.language import IGNORED
from corda_vlm.train.budget.options import BudgetOptions, KeepMetric
from corda_vlm.train.budget.parts import (
    Parts,
    batch_sizes,
    batches_of,
    choices_of,
    grouped,
    in_parts,
)
from corda_vlm.train.next_token import answer_logits
from corda_vlm.train.terms.knowledge import ReadyBatches

Values = Float[np.ndarray, " n"]
"""What the model did on each record: 1 is right, or as before; 0 is not."""

MANY = 100
"""Classes from which on the true one may be among five."""

_BATCH = 64
"""Images that the model is run on at a time."""

_KNOWS = 0.25
"""The share of answers that a model gets wholly right for these to tell what it keeps."""


@dataclass(frozen=True)
class HowProbed:
    """What all probes have in common.

    Attributes:
        processor: the model's; None for ready batches.
        metric: as of `BudgetOptions.keep_metric`.
        classes: names for the prompts; None takes the records' own.
        templates: prompts with `{}` for the name.
        bf16: whether the model runs under bfloat16 autocast.
        chat: how conversations become tokens.
    """

    processor: Processor | None = None
    metric: KeepMetric = BudgetOptions.keep_metric
    classes: Sequence[str] | None = None
    templates: Sequence[str] = BudgetOptions.probe_templates
    bf16: bool = False
    chat: ChatOptions = field(default_factory=ChatOptions)


class Probe(ABC):
    """Records in parts, of which each tells for itself.

    Attributes:
        metric: what is told of each record.
        chance: what guessing gives.
        parts: how many there are.
        sizes: how the records are cut: how many each part has, or each batch of it.
        fingerprint: of the records.
        what: names them.
        records: themselves; None for ready batches.
        bf16: whether the model runs under bfloat16 autocast.
    """

    metric: str
    chance: float
    parts: int
    sizes: list[Any]
    fingerprint: str
    what: str
    records: Records | None = None
    bf16: bool

    @property
    def identity(self) -> dict[str, Any]:
        """What decides about what it says, as JSON."""
        return {
            "metric": self.metric,
            "chance": self.chance,
            "data": self.fingerprint,
            "parts": self.sizes,
            "bf16": self.bf16,
        }

    @abstractmethod
    def look(self, model: nn.Module, part: int) -> Values:
        """What a model does on each record of a part."""

    def look_at_all(self, model: nn.Module) -> Values:
        return np.concatenate([self.look(model, part) for part in range(self.parts)])


class LabeledProbe(Probe):
    """Images that a model classifies by the prompts of their class names."""

    def __init__(self, family: Family, records: Records, how: HowProbed) -> None:
        assert how.processor is not None
        self.family, self.processor, self.bf16 = family, how.processor, how.bf16
        names = _class_names(records, how.classes)
        many = len(names.names) > MANY
        self.metric = ("top5" if many else "top1") if how.metric == "auto" else how.metric
        templates = probe_templates(how.templates)
        self.chance = min(5 if self.metric == "top5" else 1, len(names.names)) / len(names.names)
        if self.chance == 1.0:
            raise DataError(
                f"{records.spec}: {self.metric} among {len(names.names)} classes is always right and tells nothing; give a probe "
                "with more classes, or keep_metric top1 or agreement"
            )
        parts = in_parts(records)
        self._tasks = [
            ZeroShot(part, names.names, templates, (self.metric,), names.remap) for part in parts
        ]
        self._cache = Cache()
        self.parts, self.sizes = len(parts), [len(part) for part in parts]
        self.fingerprint, self.what, self.records = records.fingerprint, str(records.spec), records
        self._prompts = {
            "classes": _digest(map(str, names.names)),
            "templates": _digest(templates),
        }

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, **self._prompts}

    def look(self, model: nn.Module, part: int) -> Values:
        encoder = Encoder(
            model, self.family, self.processor, batch_size=_BATCH, bf16=self.bf16, cache=self._cache
        )
        (outcome,) = self._tasks[part].outcomes(encoder)
        return outcome.values


class _BatchProbe(Probe):
    """Batches, of which a model once said what is compared with what it says now."""

    def __init__(self, batches: Parts, fingerprint: str, how: HowProbed) -> None:
        self._batches, self.parts, self.bf16 = batches, len(batches), how.bf16
        self.sizes = [batch_sizes(part) for part in batches]
        self.fingerprint, self._chat = fingerprint, how.chat.identity
        self._before: list[list[Any]] = []

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "chat": self._chat}

    def look(self, model: nn.Module, part: int) -> Values:
        values = []
        for number, batch in enumerate(self._batches[part]):
            said = self._says(model, batch)
            values.append(self._judged(said, self._before[part][number], batch))
        return np.concatenate(values)

    def _remember(self, model: nn.Module) -> None:
        self._before = [[self._says(model, batch) for batch in part] for part in self._batches]

    def _says(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        measured = MeasuredModel(model, bf16=self.bf16)
        moved = {n: measured.cast(t) for n, t in on_device(dict(batch), measured.device).items()}
        with measured.running():
            return self._answer(model, moved)

    @abstractmethod
    def _answer(self, model: nn.Module, batch: dict[str, Tensor]) -> Any: ...
    @abstractmethod
    def _judged(self, said: Any, before: Any, batch: Mapping[str, Tensor]) -> Values: ...


class NearestProbe(_BatchProbe):
    """Without labels: whether the nearest text of an image, or where there are no texts the nearest other image (or text),
    is the one that was the nearest before training. Each batch is compared within itself, and one in which there is no choice
    tells nothing."""

    metric = "agreement"

    def __init__(
        self, model: nn.Module, family: Family, batches: Parts, fingerprint: str, how: HowProbed
    ) -> None:
        super().__init__(batches, fingerprint, how)
        self._parts = family.need_contrastive(model)
        self._remember(model)
        told = [
            (len(said), choices_of(batch))
            for part, before in zip(batches, self._before, strict=True)
            for batch, said in zip(part, before, strict=True)
            if choices_of(batch) > 1
        ]
        counts = [count for count, _ in told]
        if not counts:
            raise CordaError(
                "no batch of the probe has two texts, or three images, among which the nearest could be another: pass larger "
                "batches"
            )
        self.chance = sum(count / choices for count, choices in told) / sum(counts)

    def _answer(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        bare, vectors = unwrap(model), []
        if "pixel_values" in batch:
            vectors.append(self._parts.encode_image(bare, batch["pixel_values"]))
        if "input_ids" in batch:
            vectors.append(self._parts.encode_text(bare, batch))
        with torch.autocast(vectors[0].device.type, enabled=False):  # it would round similarities
            unit = [torch.nn.functional.normalize(v.float(), dim=-1) for v in vectors]
            near = unit[0] @ unit[-1].T
        if len(unit) == 1:
            near.fill_diagonal_(-2.0)
            return near.argmax(1).cpu()
        # the first of equal texts stands for all of them
        ids = batch["input_ids"]
        first = (ids[:, None] == ids[None]).all(-1).int().argmax(1)
        return first[near.argmax(1)].cpu()

    def _judged(self, said: Tensor, before: Tensor, batch: Mapping[str, Tensor]) -> Values:
        told = said == before if choices_of(batch) > 1 else torch.empty(0)
        return told.double().numpy()


class AnswerProbe(_BatchProbe):
    """Conversations that a model answers, given the true tokens before each."""

    chance = 0.0

    def __init__(self, model: nn.Module, batches: Parts, fingerprint: str, how: HowProbed) -> None:
        super().__init__(batches, fingerprint, how)
        self._remember(model)
        self.metric = "answers" if how.metric == "auto" else how.metric
        if how.metric == "auto" and self._right() < _KNOWS:
            self.metric = "agreement"

    def _right(self) -> float:
        """The share of answers that were right before training."""
        pairs = [
            self._judged(said, said, batch)
            for part, before in zip(self._batches, self._before, strict=True)
            for batch, said in zip(part, before, strict=True)
        ]
        return float(np.concatenate(pairs).mean())

    def _answer(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits, _ = answer_logits(unwrap(model), batch)
        return logits.argmax(-1).cpu()

    def _judged(self, said: Tensor, before: Tensor, batch: Mapping[str, Tensor]) -> Values:
        labels = batch["labels"][:, 1:].cpu()
        learnt = labels != IGNORED
        wanted = before if self.metric == "agreement" else labels[learnt]
        right = torch.zeros(labels.shape, dtype=torch.float64)
        right[learnt] = (said == wanted).double()
        counts = learnt.sum(1)
        if self.metric == "agreement":
            return (right.sum(1) / counts.clamp(min=1))[counts > 0].numpy()
        return (right.sum(1) == counts).double()[counts > 0].numpy()


def make_probe(
    model: nn.Module, records: Records | Sequence[Mapping[str, Tensor]], how: HowProbed
) -> Probe:
    """What the probe's records tell of a model, and told of it as it is now.

    Args:
        records: or ready batches of them: for models that generate text with labels, as `make_batches(..., must_learn=True)`
            gives them; for others images, texts or both.

    Raises:
        DataError: the records lack what the metric needs.
        CordaError: a metric that is not for models of this family, or records without the model's processor.
    """
    bare = unwrap(model)
    family = detect_family(bare)
    check_metric(how.metric, family)
    if not isinstance(records, Records):
        if not records:
            raise CordaError("the probe has no batches: pass at least one")
        fingerprint = ReadyBatches(records, 0).fingerprint
        chosen = family.generative is None  # among those of its batch
        batches = grouped([b for b in records if not chosen or choices_of(b) > 1])
        what = "the probe"
    else:
        if how.processor is None:
            raise CordaError("a probe of records needs the model's processor: pass processor=")
        labeled = records.labels is not None and records.class_names is not None
        if family.generative is None and labeled and how.metric != "agreement":
            return LabeledProbe(family, records, how)
        batches = [batches_of(part, how.processor, how.chat) for part in in_parts(records)]
        what, fingerprint = str(records.spec), records.fingerprint
    if how.metric in ("top1", "top5"):
        raise DataError(
            f"{what}: {how.metric} needs records with labels; name their column with label:, or take keep_metric agreement"
        )
    probe = (
        NearestProbe(model, family, batches, fingerprint, how)
        if family.generative is None
        else AnswerProbe(model, batches, fingerprint, how)
    )
    probe.what, probe.records = what, records if isinstance(records, Records) else None
    return probe


def check_metric(metric: KeepMetric, family: Family) -> None:
    """Raise `CordaError` for a metric of what models of the family do not give."""
    if family.generative is not None and metric in ("top1", "top5"):
        raise CordaError(
            f"keep_metric {metric} classifies images by prompts, and models of the family {family.name!r} generate text: choose "
            "answers or agreement"
        )
    if family.generative is None and metric == "answers":
        raise CordaError(
            f"keep_metric answers is for models that generate text, and those of the family {family.name!r} compare images with "
            "texts: choose top1, top5 or agreement"
        )
    if family.generative is None and family.contrastive is None:
        raise CordaError(
            f"a budget looks at what a model gives out, and of models of the family {family.name!r} it is not known what that "
            "is; leave keep out"
        )


def probe_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Prompts, or those of the list that one name alone without braces names."""
    named = len(templates) == 1 and "{" not in templates[0]
    return load_templates(templates[0] if named else list(templates))


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:16]


def _class_names(records: Records, classes: Sequence[str] | None) -> ClassNames:
    """The class names of the prompts: more of them where others are known that hold the records' own."""
    own = [str(name) for name in records.class_names or ()]
    if classes is None or not set(own) <= set(map(str, classes)):
        return ClassNames(tuple(own))
    return match_class_names(list(map(str, classes)), own, what="the probe")
