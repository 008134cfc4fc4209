"""A model as the evaluators see it: images and texts become unit vectors, whatever the family."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from corda_vlm.evaluation.models.base import MeasuredModel
from corda_vlm.evaluation.models.finite import FiniteCheck
from corda_vlm.evaluation.predictions import Prediction
from corda_vlm.families.base import Family, Processor
from corda_vlm.progress import advance

_ClassifierKey = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Cache:
    """What evaluations of models that differ in their weights alone have in common; pass one to all of them.

    A study measures dozens of models on the same few thousand images: with a cache they are decoded and
    preprocessed once, and where only the vision tower is trained the text side is encoded once.

    Attributes:
        data: data sets that were loaded, with the pixels they keep.
        classifiers: class names and templates -> (embeddings of a few of the prompts, classifier).
    """

    data: dict[str, Any] = field(default_factory=dict)
    classifiers: dict[_ClassifierKey, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder(MeasuredModel):
    """Encodes images and texts for one evaluation.

    Attributes:
        cache: what the evaluations of a study have in common.
        heard: what the model said of each example, which evaluators add to; None where nobody asked for it.
    """

    family: Family
    processor: Processor
    cache: Cache = field(default_factory=Cache, repr=False, kw_only=True)
    heard: list[Prediction] | None = field(default=None, repr=False, kw_only=True)

    def images(self, batches: Iterable[Float[Tensor, "b 3 h w"]]) -> Float[Tensor, "n d"]:
        """Unit vectors of batches of pixels, taken one by one so that a large data set never lies in memory.

        Raises:
            NotFiniteError: the model's output is NaN or Inf.
        """
        encode = self.family.need_contrastive(self.model).encode_image
        embeddings, check = [], FiniteCheck("images")
        for pixels in batches:
            with self.running():
                vectors = encode(self.model, self.cast(pixels.to(self.device)))
            check(vectors)
            embeddings.append(F.normalize(vectors.float(), dim=-1).cpu())
            advance(len(pixels) * self.share.size)
        return torch.cat(embeddings)

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit vectors of texts.

        Raises:
            NotFiniteError: the model's output is NaN or Inf.
        """
        starts = range(0, len(texts), self.batch_size)

        def own() -> dict[int, Tensor]:
            mine = range(self.share.rank, len(starts), self.share.size)
            chunks = {number: texts[starts[number] :][: self.batch_size] for number in mine}
            return {n: self._text_batch(self._tokens(chunk)).cpu() for n, chunk in chunks.items()}

        encoded = self.together("the texts", own)
        return torch.cat([encoded[number] for number in range(len(starts))])

    def classifier(
        self, class_names: Sequence[str], templates: Sequence[str]
    ) -> Float[Tensor, "d classes"]:
        """open_clip's zero-shot classifier: for each class the mean of its prompts' unit vectors, normalized."""
        key = (tuple(class_names), tuple(templates))
        # Weights may change between evaluations that share a cache, but not those of a frozen text tower:
        # a few prompts show it, as any change of a weight changes their embeddings to the bit.
        every = -(-len(class_names) // 16)
        probe = self.texts([templates[0].format(name) for name in class_names[::every]])
        known = self.cache.classifiers.get(key)
        if known is not None and torch.equal(known[0], probe):
            return known[1]
        from open_clip import build_zero_shot_classifier

        weights = build_zero_shot_classifier(
            _OpenClipFace(self),
            self._tokens,
            list(class_names),
            list(templates),
            num_classes_per_batch=max(1, self.batch_size // len(templates)),
            device=self.device,
        ).cpu()
        self.cache.classifiers[key] = (probe, weights)
        return weights

    def _tokens(self, texts: Sequence[str]) -> _Tokens:
        return _Tokens(self.processor.text(list(texts)))

    def _text_batch(self, tokens: _Tokens) -> Float[Tensor, "n d"]:
        encode = self.family.need_contrastive(self.model).encode_text
        with self.running():
            vectors = encode(self.model, tokens.to(self.device).batch)
        FiniteCheck("texts")(vectors)
        return F.normalize(vectors.float(), dim=-1)


@dataclass(frozen=True)
class _Tokens:
    """A tokenized batch that moves between devices as open_clip expects of its token tensor."""

    batch: dict[str, Tensor]

    def to(self, device: torch.device | str) -> _Tokens:
        return _Tokens({name: tensor.to(device) for name, tensor in self.batch.items()})


@dataclass(frozen=True)
class _OpenClipFace:
    """The one method of an open_clip model that its classifier builder calls, for any family."""

    encoder: Encoder

    def encode_text(self, tokens: _Tokens, normalize: bool = False) -> Tensor:
        assert normalize, "open_clip's builder averages unit vectors"
        return self.encoder._text_batch(tokens)
