"""Calibration that can be stopped at any moment, and goes on from its file: what is asked for, and the checkpoint."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corda_vlm.covariance.observer import Observer, observe
from corda_vlm.covariance.output_observer import OutputSide
from corda_vlm.covariance.store import CovarianceStore
from corda_vlm.covariance.tokens import Masks
from corda_vlm.distributed.deal import ALONE, Share
from corda_vlm.errors import CalibrationError, ForeignFileError
from corda_vlm.families import Batch
from corda_vlm.families.base import device_of, on_device
from corda_vlm.files import sweep
from corda_vlm.names import quoted
from corda_vlm.sites import Site
from corda_vlm.tensors import as_bytes

# ------------------------------------------------------------------ the data


class Source:
    """The batches, and what identifies them."""

    def __init__(self, batches: Iterable[Any]) -> None:
        if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
            raise CalibrationError(
                f"batches is a {type(batches).__name__}; expected an iterable of mappings. For a single batch, give "
                "a list of it"
            )
        self._batches = batches
        self.as_mapping: Callable[[Any], Any] = lambda batch: (
            batch
        )  # as a mapping of the model's arguments
        self._iterator: Iterator[Any] | None = None
        try:
            self.total: int | None = len(batches)  # type: ignore[arg-type]
        except TypeError:
            self.total = None
        if self.total == 0:
            raise no_batches()
        self._by_number: Callable[[int], Any] | None = getattr(batches, "batch_at", None)
        named = getattr(batches, "fingerprint", None)
        self.fingerprint = named if isinstance(named, str) else self._hash_first()

    def _hash_first(self) -> str:
        iterator = iter(self._batches)
        first = next(iterator, None)
        if first is None:
            raise no_batches()
        self._iterator = chain([first], iterator)
        return _hash(first, self.total)

    def batches(
        self, done: int, device: torch.device, share: Share = ALONE, *, by_number: bool = True
    ) -> Iterator[tuple[int, Batch | None]]:
        """The number of each batch after the first `done` that is in the share, and the batch on a device.

        Of `make_batches` the others are not even built. A batch is None of which no record was of use; without `by_number`,
        that has no number and is left out.

        Raises:
            CalibrationError: a batch that is no mapping.
        """
        useful, batch_at = False, self._by_number if by_number else None
        for number, item in self._numbered(done, share, batch_at):
            batch = self.as_mapping(item)
            if not isinstance(batch, Mapping):
                raise CalibrationError(
                    f"batch {number} (from 0) is {_described(batch)}, not a mapping of the model's arguments such as "
                    "{'pixel_values': ..., 'input_ids': ...}. Name what it holds, e.g. batches = [{'input_ids': ids, "
                    "'attention_mask': mask} for ids, mask in loader]"
                )
            useful = useful or bool(batch)
            yield number, on_device(batch, device) if batch or batch_at is None else None
        if batch_at is not None and not useful:
            next(iter(self._batches), None)  # raises where no record of all is of use

    def _numbered(
        self, done: int, share: Share, batch_at: Callable[[int], Any] | None
    ) -> Iterator[tuple[int, Any]]:
        first = share.from_on(done)
        if batch_at is not None:
            assert self.total is not None
            yield from ((n, batch_at(n)) for n in range(first, self.total, share.size))
        else:
            remaining = islice(self._iterator or iter(self._batches), first, None, share.size)
            yield from zip(count(first, share.size), remaining)


def _described(batch: object) -> str:
    """What a batch is that is no mapping, e.g. "a list of 2 (Tensor (4, 12), str)"."""
    kind = type(batch).__name__
    if not isinstance(batch, (tuple, list)):
        return f"a {kind}"
    told = (
        f"Tensor {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in batch[:4]
    )
    return f"a {kind} of {len(batch)} ({', '.join(told)})"


def no_batches() -> CalibrationError:
    return CalibrationError(
        "no calibration batches: the data is empty, or an iterator that was used up before. A covariance needs at "
        "least as many tokens as its layer is wide"
    )


def _hash(batch: object, total: int | None) -> str:
    digest = hashlib.blake2b(f"{total};".encode(), digest_size=16)
    items = batch.items() if isinstance(batch, Mapping) else [("", batch)]
    for key, value in sorted(items, key=lambda item: str(item[0])):
        digest.update(f"{key}:".encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(as_bytes(value))
        elif isinstance(value, (str, int, float, list, tuple)):
            digest.update(repr(value).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------ what is asked for


@dataclass(frozen=True)
class Calibration:
    """What `collect_covariance` is asked for, however the batches are run; its arguments say what each is.

    Attributes:
        store: the one to add to, or None.
        output_side: what of the output side is collected too.
        share: of the batches, where several processes collect together.
    """

    model: nn.Module
    sites: tuple[Site, ...]
    source: Source
    forward: Callable[[nn.Module, Batch], object]
    masks: Callable[[Batch], Masks]
    rounds: int
    precision: str
    device: torch.device | str | None
    store: CovarianceStore | None
    output_side: OutputSide | None = None
    share: Share = ALONE

    @property
    def base(self) -> tuple[str, ...]:
        """Fingerprints of the data of the store that is added to."""
        return () if self.store is None else self.store.data_fingerprints

    def batches(self, done: int = 0) -> Iterator[tuple[int, Batch | None]]:
        """Those of the share after the first `done`, on the model's device; otherwise as `Source.batches`.

        Raises:
            CalibrationError: a batch that is no mapping.
        """
        yield from self.source.batches(done, device_of(self.model), self.share)

    @contextmanager
    def observing(
        self,
        sites: Sequence[Site],
        *,
        scratch: Path | None,
        saved: CovarianceStore | None = None,
    ) -> Iterator[Observer]:
        """An observer of `sites` that goes on from a checkpoint, from the store that is added to, or from nothing."""
        with observe(
            self.model,
            sites,
            rounds=self.rounds,
            precision=self.precision,
            device=self.device,
            # One round of several is at work at a time: the others are on the disk.
            scratch=scratch if self.rounds > 1 else None,
            output_side=self.output_side,
        ) as observer:
            if saved is not None:
                observer.start_from(saved, resume=True, share=self.share)
            elif self.store is not None:
                observer.start_from(self.store, resume=False, share=self.share)
            yield observer

    def run(self, observer: Observer, batch: Batch | None, number: int) -> None:
        """Count one batch; of none there is nothing to count."""
        if batch is None:
            observer.batches = number + 1
            return
        with observer.step(self.masks(batch), number):
            if observer.outputs is None:
                self.forward(self.model, batch)
            else:
                observer.outputs.run(self.model, batch, number)

    def check_batches(self, count: int) -> None:
        """Raise `CalibrationError` unless so many batches are enough."""
        if count == 0:
            raise no_batches()
        if self.rounds > count:
            raise CalibrationError(
                f"{self.rounds} rounds need at least {self.rounds} batches, and there are {count}; take fewer rounds, "
                "more data or smaller batches"
            )

    def check_resumable(
        self, saved: CovarianceStore, path: Path, sites: Sequence[Site] | None = None
    ) -> None:
        """Raise `ForeignFileError`, naming the difference, unless `saved` is of this calibration.

        Args:
            sites: those that it has to hold; None for all.
        """
        progress = saved.progress
        asked = {site.name: site.stream for site in (self.sites if sites is None else sites)}
        if progress is None:
            what = "holds covariances that were merged or written by hand"
        elif progress.data != self.source.fingerprint:
            what = (
                f"is of other data (fingerprint {progress.data}, now {self.source.fingerprint}; batches have to come in "
                "the same order)"
            )
        elif progress.base != self.base:
            what = (
                f"was added to another store (of data {list(progress.base)}, now {list(self.base)})"
            )
        elif saved.round_count != self.rounds:
            what = f"has rounds={saved.round_count}, now {self.rounds}"
        elif saved.precision != self.precision:
            what = f"has precision={saved.precision!r}, now {self.precision!r}"
        elif (outputs := self._other_outputs(saved)) is not None:
            what = outputs
        elif not asked.items() <= saved.site_streams.items():
            missing = sorted(name for name, _ in asked.items() - saved.site_streams.items())
            what = f"lacks the sites {quoted(missing)}"
        else:
            return
        raise ForeignFileError(
            f"{path} {what}, so this calibration cannot go on from it. Give another path, or delete the file to start "
            "anew"
        )

    def _other_outputs(self, saved: CovarianceStore) -> str | None:
        """How its output side is not what is asked for; a finished file may have one that is not."""
        if self.output_side is None:
            finished = saved.progress is not None and saved.progress.complete
            return (
                None
                if saved.outputs is None or finished
                else "has an output side, now not asked for"
            )
        if saved.outputs is None:
            return "has no output side, now output_side=True"
        if saved.outputs.draws != self.output_side.draws:
            return f"has draws={saved.outputs.draws}, now {self.output_side.draws}"
        return None


# ------------------------------------------------------------------ stopping and going on


class Checkpoint:
    """Writes the observer's sums to the path, as often as it is cheap."""

    def __init__(
        self,
        path: str | Path | None,
        share: float,
        observer: Observer,
        source: Source,
        base: Sequence[str],
    ) -> None:
        self._path = None if path is None else Path(path)
        self._share, self._observer, self._source, self._base = share, observer, source, base
        self._took, self._ended = 0.0, time.monotonic()
        if self._path is not None:
            sweep(self._path.parent)

    @property
    def is_due(self) -> bool:
        """May the sums be written again, by the share of the time that this takes?"""
        if self._path is None:
            return False
        return self._took <= self._share * (time.monotonic() - self._ended) or self._share == 1

    def after_batch(self) -> None:
        if self.is_due:
            self.write()

    def write(self) -> None:
        if self._path is None or self._observer.batches == 0:
            return
        began = time.monotonic()
        sums = self._observer.store(data=self._source.fingerprint, base=self._base, complete=False)
        sums.save(self._path)
        self._ended = time.monotonic()
        self._took = self._ended - began

    def stopped(self) -> str:
        done, total = self._observer.batches, self._source.total
        if done == 0:
            return "calibration stopped before the end of its first batch; nothing was saved"
        return (
            f"calibration stopped after {done}{f' of {total}' if total else ''} batches; they are saved in "
            f"{self._path}. Run the same command again to go on from there"
        )
