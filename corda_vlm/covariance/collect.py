"""Collect the covariances of a model over calibration batches, with checkpoints."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from corda_vlm.covariance.checkpoint import (
    Checkpoint,
    Interrupts,
    Source,
    check_resumable,
    no_batches,
    sweep,
)
from corda_vlm.covariance.observe import Observer, observe
from corda_vlm.covariance.store import CovarianceStore, some
from corda_vlm.covariance.tokens import Masks
from corda_vlm.errors import CalibrationError, ForeignFileError
from corda_vlm.families import Batch, detect_family, token_masks
from corda_vlm.families.base import evaluating
from corda_vlm.sites import Site, find_sites, model_fingerprint

_log = logging.getLogger(__name__)


def collect_covariance(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Sequence[Site] | None = None,
    *,
    forward: Callable[[nn.Module, Batch], object] | None = None,
    masks: Callable[[Batch], Masks] | None = None,
    tokens: str = "all",
    rounds: int = 1,
    precision: str = "float32",
    store: CovarianceStore | None = None,
    show_progress: bool = True,
    path: str | Path | None = None,
    checkpoint_share: float = 0.1,
    device: torch.device | str | None = None,
) -> CovarianceStore:
    """The mean second moments `X Xᵀ / tokens` of the inputs of `sites`, over `batches`.

    The model runs without gradients and in eval mode, and is left as it was: modes, packed attention, no hooks.

    With a `path` the calibration is checkpointed there and goes on from there: after a kill nothing is lost but the
    batch in flight (and those before it for which writing would have cost more than `checkpoint_share` of the
    time). The matrices are those of an uninterrupted run, to the bit. Ctrl-C and SIGTERM finish the batch in
    flight and write; a second one stops at once. A finished file is returned without running the model. One
    process at a time may use a path.

    Args:
        batches: mappings as the model takes them, moved to the model's device here; e.g. of `make_batches`. To go on
            after a stop they have to come in the same order again. Their attribute `fingerprint`, if any, says
            what they are; otherwise the first batch does, and their number where it is known.
        sites: of `find_sites`; None for all.
        forward: runs one batch, as in PEFT's EVA; None for the family's own.
        masks: batch -> tower -> (B, L), True on tokens that count; None for the family's own.
        tokens: of a language model's sequence "all", "prompt", "response", "image" or "text", see
            `families.token_masks`; a part of what identifies the data.
        rounds: deal the batches, in turn, to this many covariances a stream. With a `path` those on the CPU are in
            mapped files beside it meanwhile, and in memory one triangle at a time.
        precision: "float32", "float64", or "bf16" (products in bfloat16 on a CPU and TF32 on CUDA, float32 sums).
        store: add to this one; it is left as it is.
        path: file for checkpoints and for the result, which then stays on disk until asked for.
        checkpoint_share: of the time, at most, for writing checkpoints; 1 writes one after every batch.
        device: of the accumulators, e.g. "cpu" to spare the model's; None for that of the activations.

    Returns:
        The store; loaded lazily from `path` if there is one.

    Raises:
        CalibrationError: no batches, a batch that is no mapping, NaN or Inf in an input (names site and batch), a
            site that no token reached, padding that cannot be told, more rounds than batches.
        ForeignFileError: `path` holds something else, or a calibration of another model, of other data or settings.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the checkpoint is written.

    Warns:
        UserWarning: a stream has fewer tokens than its width, so that its covariance has no full rank.
    """
    if not 0 < checkpoint_share <= 1:
        raise CalibrationError(
            f"checkpoint_share is {checkpoint_share}; it must be over 0 and at most 1"
        )
    if masks is not None and tokens != "all":
        raise CalibrationError(
            f"give masks= or tokens={tokens!r}, not both: either says what counts"
        )
    family = detect_family(model) if forward is None or masks is None else None
    forward = forward or family.forward  # type: ignore[union-attr]
    masks = masks or token_masks(family, model, tokens)  # type: ignore[arg-type]
    sites = list(find_sites(model) if sites is None else sites)
    source = Source(batches)
    if tokens != "all":
        source.fingerprint += f"-{tokens}"
    if source.total is not None and rounds > source.total:
        raise _too_many_rounds(rounds, source.total)
    if store is not None:
        _check_base(store, model, sites, rounds)
    base = () if store is None else store.data_fingerprints
    saved = None
    if path is not None and Path(path).exists():
        saved = CovarianceStore.load(path, model=model, unfinished=True)
        check_resumable(saved, Path(path), sites, rounds, precision, source.fingerprint, base)
        assert saved.progress is not None
        if saved.progress.complete:
            _log.info("%s is finished already", path)
            return saved
    # One round of several is at work at a time: the others are on the disk.
    scratch = Path(path).absolute().parent if path is not None and rounds > 1 else None
    with (
        Interrupts(active=path is not None) as interrupts,
        evaluating(model),
        observe(
            model, sites, rounds=rounds, precision=precision, device=device, scratch=scratch
        ) as observer,
    ):
        if saved is not None:
            observer.start_from(saved, resume=True)
        elif store is not None:
            observer.start_from(store, resume=False)
        checkpoint = Checkpoint(path, checkpoint_share, observer, source, base)
        try:
            _run(model, source, observer, forward, masks, checkpoint, interrupts, show_progress)
        except Exception as error:
            # What was counted before is sound, unless an accumulator was left half way. Keep it.
            if observer.consistent:
                with suppress(Exception):
                    checkpoint.write()
            if interrupts.asked:  # Ctrl-C reaches the workers of a DataLoader too, which then fail
                raise KeyboardInterrupt(checkpoint.stopped()) from error
            raise
        if interrupts.asked:
            checkpoint.write()
            raise KeyboardInterrupt(checkpoint.stopped())
        if observer.batches == 0:
            raise no_batches()
        if rounds > observer.batches:
            raise _too_many_rounds(rounds, observer.batches)
        _warn_if_scarce(observer)
        result = observer.store(data=source.fingerprint, base=base)
        if path is None:
            return result
        result.save(path)
        sweep(Path(path))
        if interrupts.asked:
            raise KeyboardInterrupt(f"the calibration was finished, and saved in {path}")
    return CovarianceStore.load(path)


def _run(
    model: nn.Module,
    source: Source,
    observer: Observer,
    forward: Callable[[nn.Module, Batch], object],
    masks: Callable[[Batch], Masks],
    checkpoint: Checkpoint,
    interrupts: Interrupts,
    show_progress: bool,
) -> None:
    """Run the batches that are left, until they end or an interrupt asks to stop."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    done, began = observer.batches, time.monotonic()
    bar = tqdm(
        total=source.total,
        initial=done,
        desc="covariance",
        unit="batch",
        disable=not show_progress,
        leave=True,
    )
    with bar, torch.no_grad():
        remaining = source.after(done)
        while not interrupts.asked:
            batch = next(remaining, None)
            if batch is None or interrupts.asked:
                break
            if not isinstance(batch, Mapping):
                raise CalibrationError(
                    f"batch {observer.batches} (from 0) is a {type(batch).__name__}, not a mapping of the model's "
                    "arguments such as {'pixel_values': ..., 'input_ids': ...}"
                )
            batch = _on(device, batch)
            with observer.step(masks(batch)):
                forward(model, batch)
            bar.set_postfix_str(
                f"{observer.tokens / (time.monotonic() - began):,.0f} tokens/s", refresh=False
            )
            bar.update()
            checkpoint.after_batch()


def _on(device: torch.device, batch: Batch) -> Batch:
    if all(value.device == device for value in batch.values() if isinstance(value, Tensor)):
        return batch
    return {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


# ------------------------------------------------------------------ checks


def _check_base(
    store: CovarianceStore, model: nn.Module, sites: Sequence[Site], rounds: int
) -> None:
    """Raise unless the sums of this calibration can be added to `store`."""
    if (found := model_fingerprint(model)) != store.model_fingerprint:
        raise ForeignFileError(
            f"the store to add to is of another model: its fingerprint is {store.model_fingerprint}, that of this "
            f"{type(model).__name__} is {found}"
        )
    asked = {site.name: site.stream for site in sites}
    if asked != store.site_streams:
        names = sorted({name for name, _ in asked.items() ^ store.site_streams.items()})
        raise CalibrationError(
            f"the store to add to differs in the sites {some(names)}; give sites=store.sites"
        )
    if rounds != store.round_count:
        raise CalibrationError(
            f"the store to add to has {store.round_count} rounds, not {rounds}; give rounds={store.round_count}"
        )


def _warn_if_scarce(observer: Observer) -> None:
    scarce = observer.scarce()
    if scarce:
        stream, (tokens, width) = max(scarce.items(), key=lambda item: item[1][1] - item[1][0])
        warnings.warn(
            f"{len(scarce)} streams have fewer tokens than their width, so their covariances have no full rank; e.g. "
            f"{stream}: {tokens} tokens for width {width}. Take at least {width} tokens, or rely on damping",
            stacklevel=3,
        )


def _too_many_rounds(rounds: int, batches: int) -> CalibrationError:
    return CalibrationError(
        f"{rounds} rounds need at least {rounds} batches, and there are {batches}; take fewer rounds, more data or "
        "smaller batches"
    )
