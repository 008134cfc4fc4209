"""Collect the covariances of a model over calibration batches, with checkpoints."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from corda_vlm.covariance.blockwise import collect_blockwise, discard, folder_of
from corda_vlm.covariance.checkpoint import Calibration, Checkpoint, Source
from corda_vlm.covariance.model_output import outputs_of
from corda_vlm.covariance.observer import Observer
from corda_vlm.covariance.options import CollectKeywords, CollectOptions
from corda_vlm.covariance.output_observer import OutputSide
from corda_vlm.covariance.store import CovarianceStore, too_few
from corda_vlm.covariance.together import (
    PooledCheckpoint,
    check_processes,
    pooled_result,
    run_together,
)
from corda_vlm.covariance.tokens import Masks
from corda_vlm.distributed.agree import (
    made_by_first,
    made_everywhere,
    told_by_first,
    told_everywhere,
)
from corda_vlm.distributed.deal import Share
from corda_vlm.distributed.first import locked_by_first
from corda_vlm.errors import CalibrationError, CordaError, ForeignFileError
from corda_vlm.families import Batch, Family, any_family, token_masks
from corda_vlm.families.base import evaluating
from corda_vlm.families.options import SiteOptions
from corda_vlm.files import check_path
from corda_vlm.interrupts import Interrupts
from corda_vlm.locks import locked
from corda_vlm.names import quoted
from corda_vlm.options import as_keywords, options_from
from corda_vlm.precision import takes_bf16
from corda_vlm.progress import Meter, showing
from corda_vlm.sites import Site, find_sites, model_fingerprint

_log = logging.getLogger(__name__)


def collect_covariance(
    model: nn.Module,
    batches: Iterable[Batch | torch.Tensor | Sequence[Any]],
    sites: Sequence[Site] | None = None,
    *,
    forward: Callable[[nn.Module, Batch], object] | None = None,
    masks: Callable[[Batch], Masks] | None = None,
    store: CovarianceStore | None = None,
    show_progress: bool = True,
    path: str | Path | None = None,
    device: torch.device | str | None = None,
    **options: Unpack[CollectKeywords],
) -> CovarianceStore:
    """The mean second moments `X Xᵀ / tokens` of the inputs of `sites`, over `batches`.

    The model runs without gradients and in eval mode, and is left as it was: modes, packed attention, no hooks.

    With a `path` the calibration is checkpointed there and goes on from there: after a kill nothing is lost but the
    batch in flight (and those before it for which writing would have cost more than `checkpoint_share` of the
    time). The matrices are those of an uninterrupted run, to the bit. Ctrl-C and SIGTERM finish the batch in
    flight and write; a second one stops at once. A finished file is returned without running the model. One
    process at a time may use a path.

    In a distributed run (torchrun, `accelerate launch`) the batches are dealt out: of the batches that all processes are given,
    which have to be the same, each runs every n-th. Their sums become one, which the first process writes and all get: those of a single
    process to rounding, and to the bit dealt to the same `rounds`. Another number of processes can go on from a checkpoint. What one
    of them fails by is an error on all, and the checkpoint stays as it was last written. Batches of `make_batches` and of a list are only
    built where they are run; others are gone through by every process. A `path` is the same for all, on a file system that they share.

    Args:
        batches: mappings as the model takes them, moved to the model's device here; e.g. of `make_batches`. Of a model that no
            family knows also a tensor, its first argument, or a tuple of those that it needs. To go on
            after a stop they have to come in the same order again. Their attribute `fingerprint`, if any, says
            what they are; otherwise the first batch does, and their number where it is known.
        sites: of `find_sites`; None for those that `towers`, `roles` and `targets` choose, without them all.
        forward: runs one batch, as in PEFT's EVA; None for the family's own.
        masks: batch -> tower -> (B, L), True on tokens that count; None for the family's own.
        store: add to this one; it is left as it is.
        path: file for checkpoints and for the result, which then stays on disk until asked for.
        device: of the accumulators, e.g. "cpu" to spare the model's; None for that of the activations.
        options: of `CollectOptions`. `tokens` is a part of what identifies the data. With several `rounds` and a `path`
            covariances on the CPU are in mapped files beside it meanwhile, and in memory one triangle at a time.
            `blockwise` gives the same matrices, on a CPU to the bit: a vision tower and projector come before the blocks, in
            one go. Each finished block is then a checkpoint, in the folder `PATH.blocks` until the last is done, so that
            the disk holds them twice for a moment; without a `path` they are in the folder of the system's temporary
            files (`TMPDIR`), which had better not be in memory; and `checkpoint_share` has no say. With `output_side` the
            store gets `G = E[Σ_t g_t g_tᵀ]` of every site too, `g_t` being the gradients of a random scalar of what the
            model gives out by the site's outputs, see `corda_vlm.covariance.output_side`: one backward pass for each of
            the `draws`, without gradients of weights. They are of all rounds together, and in memory.

    Returns:
        The store; loaded lazily from `path` if there is one.

    Raises:
        CordaError: an output side of a model that has none; blockwise, and the sites are not in blocks of a language model that can run one by one; a distributed
            run whose processes were given different batches, options or paths, have no process group, or of which one failed.
        CalibrationError: no batches, a batch that is no mapping, NaN or Inf in an input (names site and batch), a
            site that no token reached, padding that cannot be told, more rounds than batches.
        ForeignFileError: `path` holds something else, or a calibration of another model, of other data or settings.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the checkpoint is written.

    Warns:
        UserWarning: a stream has fewer tokens than its width, so that its covariance has no full rank; experts that saw
            so few, for which those of their layer together stand in.
    """
    asked = options_from(CollectOptions, options, "collect_covariance")
    job = _job(model, batches, sites, forward, masks, asked, device, store)
    if path is not None:
        check_path(path)
        path = Path(path)
    chosen = {"sites": sorted(site.name for site in job.sites), "store": job.base, **asdict(asked)}
    check_processes(job.source, job.model, chosen, path)
    job = replace(job, share=Share.here())
    saved = made_everywhere("the file of covariances", lambda: _begun(path, model))
    if asked.precision == "auto":
        begun = saved or (_first_block(path) if asked.blockwise and path is not None else None)
        there = device or next(model.parameters()).device
        precision = told_by_first("the precision", lambda: _precision(begun, there))
        job = replace(job, precision=precision)
    if saved is not None and _is_complete(saved, job, path, asked.blockwise):
        _log.info("%s is finished already", path)
        if job.share.is_first:
            _tidy(path)
        return saved
    interruptible = Interrupts(
        "finishing the batch in flight, then saving", active=path is not None
    )
    # Only now: the processes of a distributed run had to agree before one of them may be turned away.
    with (
        locked_by_first(path),
        showing(show_progress and job.share.is_first),
        interruptible as interrupts,
        evaluating(model),
    ):
        result = _collected(job, path, saved, asked, interrupts)
        if job.share.is_first:
            _warn_if_scarce(result)
        if path is None:
            return result
        made_by_first("the file of covariances", lambda: _write(result, path, asked.blockwise))
        if any(told_everywhere("the end", lambda: interrupts.asked is not None)):
            raise KeyboardInterrupt(f"the calibration was finished, and saved in {path}")
    return made_everywhere("the finished covariances", lambda: CovarianceStore.load(path))


def _begun(path: Path | None, model: nn.Module) -> CovarianceStore | None:
    """What there is at the path: nothing, a checkpoint, or a finished calibration."""
    if path is None or not path.exists():
        return None
    return CovarianceStore.load(path, model=model, unfinished=True)


def _write(result: CovarianceStore, path: Path, blockwise: bool) -> None:
    result.save(path)
    if blockwise:
        discard(folder_of(path))


def _job(
    model: nn.Module,
    batches: Iterable[Batch | torch.Tensor | Sequence[Any]],
    sites: Sequence[Site] | None,
    forward: Callable[[nn.Module, Batch], object] | None,
    masks: Callable[[Batch], Masks] | None,
    asked: CollectOptions,
    device: torch.device | str | None,
    store: CovarianceStore | None,
) -> Calibration:
    """What is to be collected, once its parts go together; arguments and errors as of `collect_covariance`."""
    if sites is not None and (asked.towers or asked.roles or asked.targets):
        raise CalibrationError(
            "give sites=, or towers=, roles= and targets=: either says which layers"
        )
    if masks is not None and asked.tokens != "all":
        raise CalibrationError(
            f"give masks= or tokens={asked.tokens!r}, not both: either says what counts"
        )
    if sites is None:
        sites = find_sites(model, **as_keywords(asked, SiteOptions))
    family = any_family(model) if forward is None or masks is None else None
    source = made_everywhere("the calibration batches", lambda: Source(batches))
    if family is not None:
        source.as_mapping = partial(family.as_mapping, model)
    if asked.tokens != "all":
        source.fingerprint += f"-{asked.tokens}"
    job = Calibration(
        model,
        tuple(sites),
        source,
        forward or family.forward,  # type: ignore[union-attr]
        masks or token_masks(family, model, asked.tokens),  # type: ignore[arg-type]
        asked.rounds,
        asked.precision,
        device,
        store,
        _output_side(model, family, sites, source, forward, asked),
    )
    if source.total is not None:
        job.check_batches(source.total)
    if store is not None:
        _check_base(store, model, job.sites, asked)
    return job


def _output_side(
    model: nn.Module,
    family: Family | None,
    sites: Sequence[Site],
    source: Source,
    forward: Callable[[nn.Module, Batch], object] | None,
    asked: CollectOptions,
) -> OutputSide | None:
    if not asked.output_side:
        return None
    if forward is not None:
        raise CalibrationError(
            "with output_side=True the model runs up to what it gives out, so forward= has no say; leave one of them out"
        )
    assert family is not None  # as there is no forward=
    outputs = outputs_of(family, model, sites, asked.tokens)
    return OutputSide(outputs, asked.draws, source.fingerprint)


def _is_complete(
    saved: CovarianceStore, job: Calibration, path: Path | None, blockwise: bool
) -> bool:
    """Whether a checkpoint is a finished calibration; refuses one that the job cannot go on from."""
    assert path is not None  # it was loaded from there
    job.check_resumable(saved, path)
    assert saved.progress is not None
    if blockwise and not saved.progress.complete:
        raise ForeignFileError(
            f"{path} is the checkpoint of a calibration in one go, which cannot go on blockwise. Leave blockwise off, "
            "give another path, or delete the file to start anew"
        )
    return saved.progress.complete


def _tidy(path: Path | None) -> None:
    """Remove what a process that was killed at its very end left beside a finished file: its lock, and its blocks."""
    assert path is not None
    with (
        suppress(CordaError, OSError),
        locked(path),
    ):  # of others that are at work, or where nothing can be written
        discard(folder_of(path))


def _collected(
    job: Calibration,
    path: Path | None,
    saved: CovarianceStore | None,
    asked: CollectOptions,
    interrupts: Interrupts,
) -> CovarianceStore:
    if not asked.blockwise:
        return _in_one_go(job, path, saved, asked.checkpoint_share, interrupts)
    if path is not None:
        return collect_blockwise(job, folder_of(path), interrupts)
    # The store holds its files open; where open files cannot be removed, they stay.
    with TemporaryDirectory(prefix="corda_vlm-", ignore_cleanup_errors=True) as folder:
        return collect_blockwise(job, Path(folder), interrupts, own_folder=True)


def _first_block(path: Path) -> CovarianceStore | None:
    """One of the finished blocks of a calibration into `path`, if there are any."""
    files = sorted(folder_of(path).glob("*.safetensors"))
    return CovarianceStore.load(files[0]) if files else None


def _precision(begun: CovarianceStore | None, device: torch.device | str) -> str:
    """What "auto" means on this device: the precision that the calibration began with, if it has begun."""
    if begun is None:
        return "bf16" if takes_bf16("auto", device) else "float32"
    if begun.precision in ("bf16", "float32"):
        takes_bf16("auto", device, former=begun.precision == "bf16")  # says so
    return begun.precision


def _in_one_go(
    job: Calibration,
    path: Path | None,
    saved: CovarianceStore | None,
    checkpoint_share: float,
    interrupts: Interrupts,
) -> CovarianceStore:
    """Observe all sites at once, writing checkpoints to the path."""
    scratch = None if path is None else path.absolute().parent
    with job.observing(job.sites, scratch=scratch, saved=saved) as observer:
        kind = Checkpoint if job.share.is_all else PooledCheckpoint
        checkpoint = kind(path, checkpoint_share, observer, job.source, job.base)
        if not job.share.is_all:
            run_together(job, observer, checkpoint, interrupts)
            return pooled_result(job, observer, everywhere=path is None)
        try:
            _run(job, observer, checkpoint, interrupts)
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
        job.check_batches(observer.batches)
        return observer.store(data=job.source.fingerprint, base=job.base)


def _run(
    job: Calibration,
    observer: Observer,
    checkpoint: Checkpoint,
    interrupts: Interrupts,
) -> None:
    """Run the batches that are left, until they end or an interrupt asks to stop."""
    done, began = observer.batches, time.monotonic()
    meter = Meter("covariance", job.source.total, unit="batch", initial=done)
    with meter, torch.no_grad():
        remaining = job.batches(done)
        while not interrupts.asked:
            batch = next(remaining, None)
            if batch is None or interrupts.asked:
                break
            number, inputs = batch
            job.run(observer, inputs, number)
            speed = observer.tokens / (time.monotonic() - began)
            meter.update(tokens=f"{speed:,.0f}/s")
            checkpoint.after_batch()


# ------------------------------------------------------------------ checks


def _check_base(
    store: CovarianceStore, model: nn.Module, sites: Sequence[Site], options: CollectOptions
) -> None:
    """Raise unless the sums of this calibration can be added to `store`."""
    if (fingerprint := model_fingerprint(model)) != store.model_fingerprint:
        raise ForeignFileError(
            f"the store to add to is of another model: its fingerprint is {store.model_fingerprint}, that of this "
            f"{type(model).__name__} is {fingerprint}"
        )
    asked = {site.name: site.stream for site in sites}
    if asked != store.site_streams:
        names = sorted({name for name, _ in asked.items() ^ store.site_streams.items()})
        raise CalibrationError(
            f"the store to add to differs in the sites {quoted(names)}; give sites=store.sites"
        )
    if options.rounds != store.round_count:
        raise CalibrationError(
            f"the store to add to has {store.round_count} rounds, not {options.rounds}; give rounds={store.round_count}"
        )
    if options.output_side != (store.outputs is not None):
        has = "no output side" if options.output_side else "an output side"
        raise CalibrationError(
            f"the store to add to has {has}; give output_side={not options.output_side}"
        )


def _warn_if_scarce(store: CovarianceStore) -> None:
    if store.pooled:
        warnings.warn(f"{too_few(store)}. Take more tokens", stacklevel=3)
    used = dict.fromkeys(store.stream_of(site) for site in store)
    least = {stream: min(store.entries(stream), key=lambda entry: entry.count) for stream in used}
    scarce = {stream: entry for stream, entry in least.items() if entry.count < entry.size}
    if scarce:
        stream, worst = max(scarce.items(), key=lambda item: item[1].size - item[1].count)
        warnings.warn(
            f"{len(scarce)} streams have fewer tokens than their width, so their covariances have no full rank; e.g. "
            f"{stream}: {worst.count} tokens for width {worst.size}. Take at least {worst.size} tokens, or rely on "
            "damping",
            stacklevel=3,
        )
