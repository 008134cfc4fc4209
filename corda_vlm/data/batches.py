"""From records to batches of tensors, the same way for calibration, training and evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from corda_vlm.data.records import ImageTextData
from corda_vlm.data.text.conversations import ChatOptions, ConversationMaker
from corda_vlm.errors import DataError, UnknownNameError
from corda_vlm.families.base import Processor
from corda_vlm.families.language import LanguageProcessor

TOWERS = ("vision", "text")


@runtime_checkable
class Maker(Protocol):
    """Builds the batch of any set of records: `BatchMaker`, or `ConversationMaker` for models that generate text."""

    workers: int

    @property
    def data(self) -> Any: ...
    @property
    def processor(self) -> Any: ...
    @property
    def towers(self) -> tuple[str, ...]: ...

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """The batch of the records at `indices`; {} if none of them is of use."""
        ...


def losses(maker: Maker) -> list[str]:
    """What people are told after a pass: records that were of no use, and conversations that were cut."""
    found = [maker.data.left_out]
    if isinstance(maker, ConversationMaker) and maker.truncated:
        found.append(f"{maker.truncated:,} records were cut to {maker.limit:,} tokens")
    return [f"{maker.data.spec}: {told}" for told in found if told]


class BatchMaker:
    """Builds the batch of any set of records.

    What is small is kept in `data.cache` and so shared by every maker of the same data and processor: the
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
        data: ImageTextData,
        processor: Processor,
        *,
        towers: Sequence[str] | str | None = None,
        cache_mb: float = 512.0,
        workers: int = 0,
    ) -> None:
        self.data, self.processor, self.workers = data, processor, workers
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
            found = [image for image in pixels if image is not None]
            if not found:
                return {}
            batch["pixel_values"] = self._stacked(found, chosen)  # (B, 3, H, W)
        if "text" in self.towers:
            batch |= self._text(chosen)
        if self.data.labels is not None:
            batch["labels"] = torch.tensor([self.data.labels[index] for index in chosen])  # (B,)
        return batch

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
        if len(texts) > 50_000:  # tokenised as they come, rather than all at the start
            found = self.processor.text([texts[index] for index in indices])
        else:
            where = torch.tensor(indices)
            every = self._shared("tokens", lambda: self.processor.text(texts))
            found = {name: tokens[where] for name, tokens in every.items()}
        return {name: found[name] for name in ("input_ids", "attention_mask") if name in found}

    def _shared(self, what: str, make: Any) -> Any:
        key = (what, self.processor)
        if key not in self.data.cache:
            self.data.cache[key] = make()
        return self.data.cache[key]


class _Pixels:
    """Preprocessed images by record number, kept as far as they fit."""

    def __init__(self, data: ImageTextData, processor: Processor, cache_mb: float) -> None:
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


def _towers(data: ImageTextData, asked: Sequence[str] | str | None) -> tuple[str, ...]:
    has = {"vision": data.has_images, "text": data.texts is not None}
    if asked is None:
        return tuple(tower for tower in TOWERS if has[tower])
    chosen = (
        [tower.strip() for tower in asked.split(",")] if isinstance(asked, str) else list(asked)
    )
    for tower in chosen:
        if tower not in TOWERS:
            raise UnknownNameError("tower of a batch", tower, TOWERS)
        if not has[tower]:
            thing = {"vision": "pictures", "text": "texts"}[tower]
            raise DataError(
                f"{data.spec}: has no {thing} for the {tower} tower; name their column, "
                "or give text: a sentence such as 'a photo of a {class_name}'"
            )
    return tuple(chosen)


class BatchLoader:
    """Batches of a data set in a fixed order; every iteration gives the same ones.

    Attributes:
        fingerprint: what identifies these batches: the data's own fingerprint, and how they were chosen.
    """

    def __init__(self, maker: Maker, indices: np.ndarray, batch_size: int, chosen_by: str) -> None:
        self.maker, self.indices, self.batch_size = maker, indices, batch_size
        text = f"{maker.data.fingerprint} {','.join(maker.towers)} {batch_size} {chosen_by}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def data(self) -> ImageTextData:
        return self.maker.data

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        empty = True
        for start in range(0, len(self.indices), self.batch_size):
            batch = self.maker.batch(self.indices[start : start + self.batch_size])
            if batch:
                empty = False
                yield batch
        if empty:
            raise DataError(f"{self.data.spec}: not one record gave a batch")


def make_batches(
    data: ImageTextData,
    processor: Processor,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    limit: int | None = None,
    towers: Sequence[str] | str | None = None,
    cache_mb: float = 512.0,
    workers: int = 0,
    chat: ChatOptions | None = None,
    labelled: bool = False,
) -> BatchLoader:
    """Batches {"pixel_values": (B, 3, H, W), "input_ids": (B, L), "attention_mask": (B, L), "labels": (B,)}.

    A batch holds what the data has and `towers` asks for. The last one may be smaller. For models that generate text
    the batches are those of `ConversationMaker`, with labels (B, L) that are -100 but on the answers.

    Args:
        batch_size: records a batch.
        shuffle: take the records in a random order, the same for the same seed.
        limit: only the first so many records of that order.
        towers, cache_mb, workers: as of `BatchMaker`.
        chat, labelled: as of `ConversationMaker`, for models that generate text.

    Raises:
        DataError: the data lacks what a tower needs, or `batch_size` or `limit` is below 1.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    if not 0 <= seed < 2**32:
        raise DataError(f"seed is {seed}; it must be from 0 to {2**32 - 1}")
    order = np.random.RandomState(seed).permutation(len(data)) if shuffle else np.arange(len(data))
    maker = make_maker(
        data,
        processor,
        towers=towers,
        cache_mb=cache_mb,
        workers=workers,
        chat=chat,
        labelled=labelled,
    )
    chosen_by = f"shuffle={seed if shuffle else None} limit={limit}"
    if isinstance(maker, ConversationMaker):
        chosen_by += f" {maker.options}"
    return BatchLoader(maker, order[:limit], batch_size, chosen_by)


def make_maker(
    data: ImageTextData,
    processor: Processor,
    *,
    towers: Sequence[str] | str | None = None,
    cache_mb: float = 512.0,
    workers: int = 0,
    chat: ChatOptions | None = None,
    labelled: bool = False,
) -> Maker:
    """The maker of batches for this kind of model; see `BatchMaker` and `ConversationMaker` for the options."""
    if isinstance(processor, LanguageProcessor):
        return ConversationMaker(
            data, processor, chat=chat, labelled=labelled, cache_mb=cache_mb, workers=workers
        )
    return BatchMaker(data, processor, towers=towers, cache_mb=cache_mb, workers=workers)
