"""A language model calibrated block by block: of all covariances only those of the block in hand are in memory.

The model runs once up to its blocks, vision tower and projector included, and what each block is called with is
recorded. Then each runs in turn over all batches, and its outputs are what the next one reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.covariance.checkpoint import Calibration
from corda_vlm.covariance.observer import Observer
from corda_vlm.covariance.store import CovarianceStore, Progress
from corda_vlm.covariance.tokens import Masks
from corda_vlm.distributed.agree import (
    AT_WORK,
    made_by_first,
    made_everywhere,
    same_everywhere,
    told_everywhere,
)
from corda_vlm.errors import CordaError
from corda_vlm.families import Batch, unwrap
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.files import sweep
from corda_vlm.interrupts import Interrupts
from corda_vlm.progress import Meter
from corda_vlm.sites import Site

_TOWER = "language"
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Step = tuple[int, Masks, Callable[[], None]]
"""The number of a batch, its masks, and what runs it."""


@dataclass
class Call:
    """One batch on its way through the blocks; its tensors rest on the CPU.

    Attributes:
        hidden: (B, L, d), what the next block reads, in the model's dtype.
        others: the further arguments of each block; a tensor that several are given is kept once.
        device: where the model computes.
        autocast: whether the blocks were called under autocast, and to which precision.
        masks: see `tokens.Masks`.
        number: of the batch.
    """

    hidden: Float[Tensor, "b l d"]
    others: list[Arguments]
    device: torch.device
    autocast: tuple[bool, torch.dtype]
    masks: Masks
    number: int = 0


def collect_blockwise(
    job: Calibration, folder: Path, interrupts: Interrupts, *, own_folder: bool = False
) -> CovarianceStore:
    """What running `job` in one go gives; the store reads from a file for each block in `folder`.

    Of several processes each takes its batches through all blocks, and after each block their sums become one.

    Args:
        own_folder: has each process a folder of its own, rather than one that they share?

    Raises:
        CordaError: the sites are not in the blocks of a language model, or those cannot run one by one.
        KeyboardInterrupt: when asked for; finished blocks are in the folder.
    """
    chain = Chain.of(job.model, job.sites)
    # What comes before the blocks, and each of them up to the last that has a site.
    parts = {"before": [site for site in job.sites if site.tower != _TOWER]}
    for number in range(len(chain.blocks)):
        name = f"{chain.path}.{number}"
        parts[name] = [site for site in job.sites if site.name.startswith(f"{name}.")]
    files = {name: folder / f"{name}.safetensors" for name, members in parts.items() if members}
    finished = made_everywhere(
        "the finished blocks",
        lambda: [name for name, file in files.items() if _finished(job, file, parts[name])],
    )
    same_everywhere(
        "the finished blocks",
        {"those there": finished},
        "Give a path on a file system that all of them share",
    )
    missing = [name for name in files if name not in finished]
    # Blocks finished before an interruption run once more for the sake of those after them, without being observed.
    names = list(parts)[: list(parts).index(missing[-1]) + 1] if missing else []
    calls: list[Call] = []
    total = None if job.source.total is None else job.source.total * len(names)
    with (
        Meter("covariance", total, unit="batch") as meter,
        unpacked(job.model),
        torch.no_grad(),
    ):
        for number, name in enumerate(names):
            steps = _advance(chain, number - 1, calls) if number else _record(job, chain, calls)
            observing = job.observing(parts[name], scratch=folder)
            with observing if name in missing else nullcontext() as observer:
                work = partial(_run_part, steps, observer, interrupts, meter)
                every = told_everywhere(f"the batches of {name}", work, AT_WORK)
                if any(stopped for _, stopped in every):
                    raise KeyboardInterrupt(
                        f"calibration stopped within part {number + 1} of {len(parts)}, {name}; those before it are "
                        f"saved in {folder}. Run the same command again to go on from there"
                    )
                reached = max(reached for reached, _ in every)
                job.check_batches(reached)
                if observer is not None:
                    _save_part(job, observer, reached, files[name], own_folder)
            del observing, observer  # the sums with them, before the next block's are made
    return _joined(job, [CovarianceStore.load(file) for file in files.values()])


def _run_part(
    steps: Iterator[Step], observer: Observer | None, interrupts: Interrupts, meter: Meter
) -> tuple[int, bool]:
    """The number after the last batch, and whether somebody asked to stop before it."""
    reached = 0
    for number, masks, run in steps:
        if interrupts.asked:
            return reached, True
        with nullcontext() if observer is None else observer.step(masks, number):
            run()
        meter.update()
        reached = number + 1
    return reached, False


def _save_part(
    job: Calibration, observer: Observer, reached: int, file: Path, own_folder: bool
) -> None:
    """Write what a block has, once, or into each process's own folder."""

    def save() -> None:
        observer.store(data=job.source.fingerprint, base=job.base).save(file)

    if job.share.is_all:
        save()
        return
    observer.pool(reached)
    if own_folder:
        made_by_first("the covariances", observer.check_reached)
        observer.share_out()
        made_everywhere("the file of a block", save)
    else:
        made_by_first("the file of a block", save)


def folder_of(path: str | Path) -> Path:
    """Where the finished blocks of a calibration into `path` are kept until the last is."""
    path = Path(path)
    return path.with_name(f"{path.name}.blocks")


def discard(folder: Path) -> None:
    """Remove the files of `collect_blockwise`."""
    sweep(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with suppress(OSError):  # it never was, or holds something of somebody else's
        folder.rmdir()


def _finished(job: Calibration, file: Path, sites: Sequence[Site]) -> bool:
    if not file.exists():
        return False
    job.check_resumable(CovarianceStore.load(file, model=job.model), file, sites)
    return True


def _joined(job: Calibration, parts: Sequence[CovarianceStore]) -> CovarianceStore:
    of = {site: part for part in parts for site in part}
    progress = parts[0].progress
    assert progress is not None
    return CovarianceStore(
        job.sites,
        {site.stream: of[site.name].entries(site.stream) for site in job.sites},
        model_fingerprint=parts[0].model_fingerprint,
        data_fingerprints=parts[0].data_fingerprints,
        precision=job.precision,
        progress=Progress(progress.data, progress.base, progress.batches, complete=True),
        model_signs=parts[0].model_signs,
    )


# ------------------------------------------------------------------ running


def _record(job: Calibration, chain: Chain, calls: list[Call]) -> Iterator[Step]:
    """Run the model up to its blocks, batch by batch; fills `calls`."""
    for number, batch in job.batches():
        if batch is None:
            continue
        masks = job.masks(batch)

        def run(number: int = number, batch: Batch = batch, masks: Masks = masks) -> None:
            kept = {which: mask.cpu() for which, mask in masks.items()}
            call = chain.record(partial(job.forward, job.model, batch), kept)
            calls.append(replace(call, number=number))

        yield number, masks, run


def _advance(chain: Chain, number: int, calls: Sequence[Call]) -> Iterator[Step]:
    """Run a block, batch by batch; each call then holds what the next one reads."""
    for call in calls:
        yield call.number, call.masks, partial(chain.run, number, call)


class Chain:
    """The blocks of a language model, each of which reads what the one before it returned."""

    def __init__(self, path: str, blocks: Sequence[nn.Module]) -> None:
        self.path, self.blocks = path, tuple(blocks)
        self._tuples: bool | None = None  # do they return the hidden states in a tuple?

    @classmethod
    def of(cls, model: nn.Module, sites: Sequence[Site]) -> Chain:
        """The blocks up to the last that holds one of `sites`.

        Raises:
            CordaError: `sites` has none of a language model, or some that are in no list of blocks.
        """
        kind, bare = type(unwrap(model)).__name__, unwrap(model)
        last: dict[str, int] = {}  # of each list of blocks
        for site in sites:
            if site.tower != _TOWER:
                continue
            place = _place(bare, site.name)
            if place is None:
                raise CordaError(
                    f"{site.name} is in no block (an nn.ModuleList) of {kind}, so that it cannot be calibrated "
                    "blockwise; leave blockwise off"
                )
            path, number = place
            last[path] = max(number, last.get(path, 0))
        if len(last) != 1:
            towers = ", ".join(dict.fromkeys(site.tower for site in sites))
            raise CordaError(
                f"blockwise runs the blocks of a language model one after another, and the sites of this {kind} are in "
                f"{len(last)} of them (towers: {towers}); leave blockwise off"
            )
        path, number = last.popitem()
        return cls(path, list(bare.get_submodule(path))[: number + 1])

    def record(self, run: Callable[[], object], masks: Masks) -> Call:
        """What the blocks are called with by `run`, which runs the model. They only hand on what they read.

        Raises:
            CordaError: a block is called otherwise than with what the one before it handed on, or not at all.
        """
        others: list[Arguments] = []
        hidden: list[Tensor] = []
        autocast: list[tuple[bool, torch.dtype]] = []
        # The first of a pair keeps its address from being used again.
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(x: Tensor) -> Tensor:
            if id(x) not in kept:
                kept[id(x)] = x, x.cpu()
            return kept[id(x)][1]

        def hand_on(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if number != len(others) or not args or (hidden and args[0] is not hidden[0]):
                raise CordaError(
                    f"{self.path}.{number} does not read just what the block before it returned, so that these blocks "
                    "cannot run one after another; leave blockwise off"
                )
            hidden[:] = args[:1]
            kind = args[0].device.type
            autocast[:] = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))]
            others.append(_mapped((args[1:], kwargs), keep))
            if number == len(self.blocks) - 1:
                raise _Recorded
            if self._tuples is None:
                self._tuples = isinstance(forward(*args, **kwargs), tuple)
            return args[:1] if self._tuples else args[0]

        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                stack.enter_context(_replaced(block, partial(hand_on, number, block.forward)))
            with suppress(_Recorded):
                run()
        if len(others) < len(self.blocks):
            raise CordaError(
                f"with one of the batches the model called {len(others)} of the {len(self.blocks)} blocks "
                f"{self.path}; to be calibrated blockwise it has to call them all"
            )
        return Call(hidden[0].cpu(), others, hidden[0].device, autocast[0], masks)

    def run(self, number: int, call: Call) -> None:
        """Run one block; `call` then holds what the next one reads."""
        args, kwargs = _mapped(call.others[number], lambda x: x.to(call.device))
        enabled, dtype = call.autocast
        with torch.autocast(call.device.type, dtype, enabled=enabled):
            output = self.blocks[number](call.hidden.to(call.device), *args, **kwargs)
        call.hidden = (output[0] if isinstance(output, tuple) else output).cpu()


class _Recorded(Exception):
    """The last block has been called: the rest of the model need not run."""


def _place(model: nn.Module, name: str) -> tuple[str, int] | None:
    """Path of the outermost list of blocks that holds a layer, and the number of its block."""
    module: Any = model
    keys = name.split(".")
    for step, key in enumerate(keys):
        if isinstance(module, nn.ModuleList):
            return ".".join(keys[:step]), int(key)
        module = getattr(module, key)
    return None


def _mapped(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """`value` with its tensors moved, within tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(item, move) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, move) for key, item in value.items()}
    if isinstance(value, _PLAIN):
        return value
    raise CordaError(
        f"the blocks are called with a {type(value).__name__}, which cannot be kept for when each of them runs; leave "
        "blockwise off, or if it is a cache of keys and values run the model without (use_cache=False)"
    )


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put `forward` in place of the module's own, which may be of its class or (accelerate's) of the module."""
    former = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if former is None:
            del module.forward
        else:
            module.forward = former
