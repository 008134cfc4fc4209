"""A model as the evaluators see it: images and texts become unit vectors, whatever the family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.evaluation.models.finite import FiniteCheck
from corda_vlm.families.base import Family, Processor, evaluating
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
class Encoder:
    """Encodes for one evaluation.

    Attributes:
        batch_size: images, or texts, at a time.
        bf16: run the model under bfloat16 autocast; similarities are computed in float32 all the same.
        workers: threads that decode images.
    """

    model: nn.Module
    family: Family
    processor: Processor
    batch_size: int = 64
    bf16: bool = False
    workers: int = 0
    cache: Cache = field(default_factory=Cache, repr=False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def images(self, batches: Iterable[Float[Tensor, "b 3 h w"]]) -> Float[Tensor, "n d"]:
        """Unit vectors of batches of pixels, taken one by one so that a large data set never lies in memory.

        Raises:
            NotFiniteError: the model's output is NaN or Inf.
        """
        encode = self.family.need_contrastive(self.model).encode_image
        embeddings, check = [], FiniteCheck("images")
        for pixels in batches:
            with self._running():
                vectors = encode(self.model, self._cast(pixels.to(self.device)))
            check(vectors)
            embeddings.append(F.normalize(vectors.float(), dim=-1).cpu())
            advance(len(pixels))
        return torch.cat(embeddings)

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit vectors of texts.

        Raises:
            NotFiniteError: the model's output is NaN or Inf.
        """
        chunks = [texts[at : at + self.batch_size] for at in range(0, len(texts), self.batch_size)]
        return torch.cat([self._text_batch(self._tokens(chunk)).cpu() for chunk in chunks])

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
        with self._running():
            vectors = encode(self.model, tokens.to(self.device).batch)
        FiniteCheck("texts")(vectors)
        return F.normalize(vectors.float(), dim=-1)

    def _cast(self, pixels: Tensor) -> Tensor:
        """A model kept in half precision wants its images so; token ids have no such precision."""
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        return pixels if weight is None or self.bf16 else pixels.to(weight.dtype)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with (
            evaluating(self.model),
            torch.no_grad(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            yield


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
