"""From records of images and texts to batches of pixels and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corda_vlm.data.records import Records
from corda_vlm.errors import DataError
from corda_vlm.families.base import Processor
from corda_vlm.families.options import chosen_names

INPUT_TOWERS = ("vision", "text")
"""The towers of which a batch of these records can hold the inputs."""


class ImageTextBatches:
    """Builds the batch of any set of records.

    What is small is kept in `data.cache` and so shared by every builder of the same data and processor: the
    preprocessed pixels if all of them take at most `cache_mb` mebibytes, and the token ids. Many short
    trainings on the same thousand images then preprocess them once.

    Args:
        data: the records.
        processor: turns images and texts into tensors.
        towers: which inputs to build, "vision", "text" or both; default: what the data has.
        cache_mb: the limit for pixels, in MiB; 0 keeps none.
        workers: threads that decode and preprocess images; 0 uses the caller's.
    """

    def __init__(
        self,
        data: Records,
        processor: Processor,
        *,
        towers: Sequence[str] | str | None = None,
        cache_mb: float = 512.0,
        workers: int = 0,
    ) -> None:
        self.data, self.processor, self.workers, self.options = data, processor, workers, None
        self.towers = _towers(data, towers)
        self._pool = ThreadPoolExecutor(workers) if workers > 0 else None
        self._pixels = self._shared("pixels", lambda: _Pixels(data, processor, cache_mb))

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """The batch of the records at `indices`; undecodable images leave it smaller, or empty ({})."""
        chosen = [int(index) for index in indices]
        batch: dict[str, Tensor] = {}
        if "vision" in self.towers:
            # Threads only help with decoding: what is cached is gathered at once.
            mapped = map if self._pool is None or self._pixels.full else self._pool.map
            pixels = list(mapped(self._pixels.get, chosen))
            chosen = [
                index for index, image in zip(chosen, pixels, strict=True) if image is not None
            ]
            images = [image for image in pixels if image is not None]
            if not images:
                return {}
            batch["pixel_values"] = self._stacked(images, chosen)  # (B, 3, H, W)
        if "text" in self.towers:
            batch |= self._text(chosen)
        if self.data.labels is not None:
            batch["labels"] = torch.tensor([self.data.labels[index] for index in chosen])  # (B,)
        return batch

    def warnings(self) -> list[str]:
        return []

    def _stacked(self, images: list[Tensor], indices: list[int]) -> Tensor:
        for image, index in zip(images, indices, strict=True):
            if image.shape != images[0].shape:
                raise DataError(
                    f"{self.data.place(index)}: preprocessed to {tuple(image.shape)}, others to "
                    f"{tuple(images[0].shape)}; the processor must give one size"
                )
        return torch.stack(images)

    def _text(self, indices: list[int]) -> dict[str, Tensor]:
        texts = self.data.texts
        assert texts is not None, "checked when the towers were chosen"
        if len(texts) > 50_000:  # tokenized as they come, rather than all at the start
            encoded = self.processor.text([texts[index] for index in indices])
        else:
            where = torch.tensor(indices)
            every = self._shared("tokens", lambda: self.processor.text(texts))
            encoded = {name: tokens[where] for name, tokens in every.items()}
        return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}

    def _shared(self, what: str, make: Any) -> Any:
        key = (what, self.processor)
        if key not in self.data.cache:
            self.data.cache[key] = make()
        return self.data.cache[key]


class _Pixels:
    """Preprocessed images by record number, kept as far as they fit."""

    def __init__(self, data: Records, processor: Processor, cache_mb: float) -> None:
        self.data, self.processor, self.cache_mb = data, processor, cache_mb
        self.kept: dict[int, Tensor] = {}
        self.keep: bool | None = None  # known once the first image has shown its size

    @property
    def full(self) -> bool:
        return len(self.kept) + len(self.data.bad) >= len(self.data)

    def get(self, index: int) -> Tensor | None:
        """(3, H, W) of record `index`, None if it does not decode."""
        if index in self.kept:
            return self.kept[index]
        record = self.data.get(index)
        if record is None:
            return None
        if record["image"] is None:
            raise DataError(f"{self.data.place(index)}: has no image")
        pixels = self.processor.image(record["image"])
        if self.keep is None:
            self.keep = (
                pixels.numel() * pixels.element_size() * len(self.data) <= self.cache_mb * 2**20
            )
        if self.keep:
            self.kept[index] = pixels
        return pixels


def _towers(data: Records, asked: Sequence[str] | str | None) -> tuple[str, ...]:
    has = {"vision": data.has_images, "text": data.texts is not None}
    chosen = chosen_names("tower of a batch", asked, INPUT_TOWERS)
    if chosen is None:
        return tuple(tower for tower in INPUT_TOWERS if has[tower])
    for tower in chosen:
        if not has[tower]:
            thing = {"vision": "pictures", "text": "texts"}[tower]
            raise DataError(
                f"{data.spec}: has no {thing} for the {tower} tower; name their column, "
                "or give text: a sentence such as 'a photo of a {class_name}'"
            )
    return tuple(chosen)
