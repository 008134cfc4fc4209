"""Watch the inputs of a model's sites while it runs: forward hooks under a context manager, nothing on modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from corda_vlm.covariance.entries import Empty, Entry, placed
from corda_vlm.covariance.moments import PRECISIONS, SecondMoment
from corda_vlm.covariance.output_observer import OutputObserver, OutputSide
from corda_vlm.covariance.pooled import home_of, pool, share_out
from corda_vlm.covariance.sharing import Sharing
from corda_vlm.covariance.store import CovarianceStore, Progress
from corda_vlm.covariance.tokens import Masks, TokenSelector
from corda_vlm.distributed.deal import ALONE, Share
from corda_vlm.errors import CalibrationError, UnknownNameError
from corda_vlm.families import any_family
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.families.layers.conv2d import geometry, places_as_rows
from corda_vlm.families.layers.matrix import shape_of
from corda_vlm.names import quoted
from corda_vlm.same_model import model_signs
from corda_vlm.sites import Site, get_layer, model_fingerprint

_OUTPUT = "output side of "


@contextmanager
def observe(
    model: nn.Module,
    sites: Sequence[Site],
    *,
    rounds: int = 1,
    precision: str = "float32",
    device: torch.device | str | None = None,
    scratch: Path | None = None,
    output_side: OutputSide | None = None,
) -> Iterator[Observer]:
    """Hooks on the inputs of `sites` for the length of the block, exceptions included.

        with observe(model, find_sites(model)) as observer, torch.no_grad():
            for batch in batches:
                with observer.step(masks={"text": batch["attention_mask"].bool()}):
                    model(**batch)
        store = observer.store(data="what the batches are")

    Packed attention is unpacked meanwhile. Eval mode, devices and gradients are the caller's business;
    `collect_covariance` takes care of them, and of checkpoints.

    Args:
        rounds: batches are dealt to this many disjoint rounds, in turn.
        precision: "float32", "float64", or "bf16" (reduced-precision products, float32 sums).
        device: of the accumulators; None for that of the activations.
        scratch: a folder for accumulators on the CPU that shall live on disk; their files have no names.
        output_side: what of the output side is collected too, by `observer.outputs.run` in place of the model; None for
            nothing.

    Raises:
        UnknownNameError: `precision`.
        NoSitesError: a site that the model does not have.
    """
    with ExitStack() as stack:
        observer = Observer(
            sites,
            model_fingerprint(model),
            model_signs=model_signs(model),
            rounds=rounds,
            precision=precision,
            device=device,
            scratch=scratch,
            loose_towers=any_family(model).loose_towers,
            output_side=output_side,
        )
        stack.enter_context(unpacked(model))
        stack.callback(observer.detach)
        observer.attach({site.name: get_layer(model, site.name) for site in sites})
        yield observer


class Observer:
    """What `observe` yields.

    Attributes:
        batches: where in the sequence of batches this is: all before it are counted in full, by this process or, of
            several, by all of them together.
        tokens: tokens counted by this observer, the towers added up.
        outputs: what looks at the output side, None where nothing is asked of it.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        model_fingerprint: str,
        *,
        model_signs: str | None = None,
        rounds: int = 1,
        precision: str = "float32",
        device: torch.device | str | None = None,
        scratch: Path | None = None,
        loose_towers: Collection[str] = (),
        output_side: OutputSide | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise UnknownNameError("precision", precision, PRECISIONS)
        if rounds < 1:
            raise CalibrationError(f"rounds is {rounds}; it must be at least 1")
        if not sites:
            raise CalibrationError(
                "no sites to observe; find_sites(model) lists those of the model"
            )
        self.sites = tuple(sites)
        self.rounds, self.precision = rounds, precision
        self._device, self._scratch = device, scratch
        self.model_fingerprint, self.model_signs = model_fingerprint, model_signs
        self.batches, self.tokens = 0, 0
        self.outputs = (
            None
            if output_side is None
            else OutputObserver(output_side, self.sites, precision, device)
        )
        self._whole = True  # no accumulator was left half way
        self._streams: dict[str, list[Site]] = {}
        for site in self.sites:
            self._streams.setdefault(site.stream, []).append(site)
        self._layers: Mapping[str, nn.Linear | nn.Conv2d] = {}
        self._widths: dict[str, int] = {}
        self._homes: dict[str, torch.device] = {}  # where sums without rows are
        # stream -> a sum for each round, none before its first rows
        self._sums: dict[str, list[Entry]] = {stream: [] for stream in self._streams}
        self._placed: set[str] = set()  # streams whose sums are on their device
        self._handles: list[RemovableHandle] = []
        self._sharing: dict[str, Sharing] = {}
        # of the batch in flight
        self._running = False
        self._number = 0  # in the sequence of batches
        self._selector = TokenSelector(loose_towers)
        self._calls: Counter[str] = Counter()  # stream -> calls so far
        self._ahead: dict[str, int] = {}  # stream -> calls that are counted already
        self._rows: Counter[str] = Counter()  # stream -> rows it had

    @property
    def consistent(self) -> bool:
        """False only while, or after, an accumulator was left half way (out of memory): not to be saved."""
        return self._whole and (self.outputs is None or self.outputs.consistent)

    # ------------------------------------------------------------------ hooks

    def attach(self, layers: Mapping[str, nn.Linear | nn.Conv2d]) -> None:
        """Put the hooks on; site name -> layer."""
        self._layers = layers
        for stream, members in self._streams.items():
            names = quoted([site.name for site in members])
            sizes = {shape_of(layers[site.name])[1] for site in members}
            if len(sizes) > 1:
                raise CalibrationError(
                    f"{names} are declared to read one input, but their widths are {sorted(sizes)}"
                )
            if len({geometry(layers[site.name]) for site in members}) > 1:
                raise CalibrationError(
                    f"{names} are declared to read one input, but take other patches of it; give them streams of their own"
                )
            self._widths[stream] = sizes.pop()
            self._homes[stream] = home_of(layers[members[0].name], self._device)
            sharing = Sharing(stream, [site.name for site in members]) if len(members) > 1 else None
            for site in members:
                # The first site counts for the stream; the others only prove, once, that they read the same.
                counts = site is members[0]
                hook = self._hook(site, sharing, counts)
                handle = layers[site.name].register_forward_pre_hook(hook, with_kwargs=True)
                self._handles.append(handle)
                if sharing is not None and not counts:
                    sharing.handles.append(handle)
            if sharing is not None:
                self._sharing[stream] = sharing
        if self.outputs is not None:
            self.outputs.attach(layers)

    def detach(self) -> None:
        """Take the hooks off."""
        if self.outputs is not None:
            self.outputs.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, site: Site, sharing: Sharing | None, counts: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Gradient checkpointing runs the forward again inside the backward pass: the same tokens.
            if not self._running or _inside_backward():
                return
            x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
            if not isinstance(x, Tensor):
                return
            with torch.inference_mode(False), torch.no_grad():
                x = x.detach()
                if sharing is not None and not sharing.proven:
                    sharing.compare(site.name, x)
                if counts:
                    self._count(site, x, getattr(module, "rows", None))

        return hook

    # ------------------------------------------------------------------ batches

    @contextmanager
    def step(self, masks: Masks | None = None, number: int | None = None) -> Iterator[None]:
        """One batch: run its forward pass in the block. Calls outside of a step are not counted.

        An exception leaves what was counted in place, and what that is on record: repeating the batch counts the
        rest of it.

        Args:
            number: of the batch, from 0, which deals it to its round; None for that after the last one.
        """
        self._number = self.batches if number is None else number
        self._selector.begin(masks)
        self._calls.clear()
        self._rows.clear()
        self._running = True
        try:
            yield
            for sharing in self._sharing.values():
                if sharing.calls:
                    sharing.conclude()
        finally:
            self._running = False
            for sharing in self._sharing.values():
                sharing.forget()
        self.tokens += self._tokens()
        self._ahead.clear()
        self.batches = self._number + 1

    def _tokens(self) -> int:
        """Of the batch: those of the busiest stream of every tower."""
        towers: dict[str, int] = {}
        for stream, rows in self._rows.items():
            tower = self._streams[stream][0].tower
            towers[tower] = max(towers.get(tower, 0), rows)
        return sum(towers.values())

    def _count(
        self, site: Site, x: Float[Tensor, "*axes"], places: Int[Tensor, " m"] | None
    ) -> None:
        stream, layer = site.stream, self._layers[site.name]
        if (
            site.pool is not None
            and places is None
            and self._selector.has_padding(site.tower, stream)
        ):
            raise CalibrationError(
                f"{site.name} is an expert with a module of its own, which is not told which of the batch's tokens it reads, and the "
                "batch has some that do not count: take batch_size=1 (--batch-size 1) and tokens='all', or transformers 5"
            )
        self._calls[stream] += 1
        counted = self._calls[stream] <= self._ahead.get(stream, 0)
        is_conv = isinstance(layer, nn.Conv2d)
        if is_conv and not counted:
            # before the first of its patches is counted, or the sum would be left half way
            self._check_finite(site, x, places_as_rows)
        moment = None
        blocks = self._selector.blocks(
            layer, x, tower=site.tower, stream=stream, site=site.name, places=places
        )
        for rows in blocks:
            self._rows[stream] += len(rows)
            if counted:
                continue  # before the exception after which this batch is repeated
            if not is_conv:
                self._check_finite(site, rows)
            self._whole = False
            moment = self._sum(stream, rows)
            moment.add(rows, self.precision)
        if counted:
            return
        if moment is not None:
            moment.release()  # its next turn is as many batches away as there are rounds
        self._ahead[stream] = self._calls[stream]
        self._whole = True

    def _sum(self, stream: str, rows: Float[Tensor, "n d"]) -> SecondMoment:
        if stream not in self._placed:  # not before the device of the activations is known
            # mps has no float64, which the means are kept in
            here = "cpu" if rows.device.type == "mps" else rows.device
            self._place(stream, rows.shape[1], here if self._device is None else self._device)
        return self._sums[stream][self._number % self.rounds].read()

    def _place(self, stream: str, width: int, device: torch.device | str) -> None:
        dtype = PRECISIONS[self.precision]
        self._sums[stream] = [
            placed(entry, dtype, device, self._scratch) for entry in self._sums[stream]
        ] or [SecondMoment(width, dtype, device, self._scratch) for _ in range(self.rounds)]
        self._placed.add(stream)

    def _check_finite(
        self,
        site: Site,
        x: Float[Tensor, "*axes"],
        as_rows: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        if not x.numel():
            return
        low, high = (float(value) for value in torch.aminmax(x))  # NaN goes through both
        largest = max(-low, high)
        # the squares have to be summed, too
        limit = torch.finfo(PRECISIONS[self.precision]).max ** 0.5 / 1e3
        if largest < limit:
            return
        readers = quoted([member.name for member in self._streams[site.stream]])
        bad = ~(as_rows(x).abs() < limit)
        raise CalibrationError(
            f"the input of {readers} has NaN, Inf or values too large to square in batch {self._number} (from 0): "
            f"{bad.double().mean().item():.2%} of the values, in {int(bad.any(1).sum())} of {len(bad)} tokens. None "
            "of them was counted. Look at that batch's inputs; if they are fine, run the model in float32 or bfloat16"
        )

    # ------------------------------------------------------------------ the result

    def store(
        self, *, data: str, base: Sequence[str] = (), complete: bool = True
    ) -> CovarianceStore:
        """What was counted, as a store. It shares the accumulators: observe no further after using it.

        Args:
            data: fingerprint of the batches.
            base: fingerprints of the data of the store that was started from.
            complete: False makes a checkpoint.

        Raises:
            CalibrationError: complete, and a site was not reached, or not in every round.
        """
        if complete:
            self.check_reached()
        nothing = {stream: [Empty(width)] * self.rounds for stream, width in self._widths.items()}
        return CovarianceStore(
            self.sites,
            {stream: sums or nothing[stream] for stream, sums in self._sums.items()},
            model_fingerprint=self.model_fingerprint,
            data_fingerprints=(*base, data),
            precision=self.precision,
            progress=Progress(data, tuple(base), self.batches, self._all_ahead(), complete),
            outputs=self.outputs and self.outputs.moments(),
            model_signs=self.model_signs,
        )

    def _all_ahead(self) -> dict[str, int]:
        """Calls that are counted already, by stream, and gradients by site with a prefix that no stream has."""
        outputs = {} if self.outputs is None else self.outputs.ahead
        return self._ahead | {f"{_OUTPUT}{site}": number for site, number in outputs.items()}

    def start_from(self, store: CovarianceStore, *, resume: bool, share: Share = ALONE) -> None:
        """Go on from the sums of `store`; with `resume` also from its place in the data.

        Args:
            share: of several processes the first goes on from the sums, and the one whose batch was counted half way from there.
        """
        for stream in self._streams if share.is_first else ():
            entries = store.entries(stream)
            if any(entry.count for entry in entries):
                self._sums[stream] = entries
        ahead: Mapping[str, int] = {}
        if resume and store.progress is not None:
            self.batches = store.progress.batches
            ahead = store.progress.ahead if share.owns(self.batches) else {}
            self._ahead = {s: n for s, n in ahead.items() if s in self._streams}
        if self.outputs is not None:
            prefixed = {f"{_OUTPUT}{site.name}": site.name for site in self.sites}
            within = {prefixed[key]: n for key, n in ahead.items() if key in prefixed}
            self.outputs.start_from(store.need_output_side() if share.is_first else None, within)

    # ------------------------------------------------------------------ several processes

    def pool(self, batches: int) -> None:
        """Let the first process have what all have counted, and the others nothing; `batches` are counted in full.

        All processes have to call this.
        """
        self._whole = False
        pool(self._every())
        if self.outputs is not None:
            self.outputs.pool_counts()
        self.batches = batches
        self._whole = True

    def share_out(self) -> None:
        """Let all processes have what the first has, as the result; all of them have to call this."""
        share_out(self._every())
        if self.outputs is not None:
            self.outputs.share_out_counts()

    def _every(self) -> list[SecondMoment]:
        """All sums, in one order for all processes; made where there is none yet."""
        sums: list[SecondMoment] = []
        for stream, width in self._widths.items():
            if stream not in self._placed:
                self._place(stream, width, self._homes[stream])
            sums += [entry.read() for entry in self._sums[stream]]
        return sums if self.outputs is None else sums + self.outputs.every()

    def check_reached(self) -> None:
        """Raise `CalibrationError` naming the sites that no token reached, in any round or in one."""
        if self.outputs is not None:
            self.outputs.check_reached()
        counts = self._reached()
        missed = [site for site in self.sites if not any(counts[site.stream])]
        if missed:
            towers = sorted({site.tower for site in missed})
            whole = [
                t for t in towers if all(site in missed for site in self.sites if site.tower == t)
            ]
            why = (
                f"the batches hold no inputs for the {' and '.join(whole)} tower: add them, or give "
                f"sites=find_sites(model, towers=...) without it (--towers on the command line)"
                if whole
                else "the model does not call them with these batches: leave them out of `sites`"
            )
            raise CalibrationError(
                f"no token reached {len(missed)} of {len(self.sites)} sites, {quoted([s.name for s in missed])}; {why}"
            )
        for stream, numbers in counts.items():
            if 0 in numbers:
                name = self._streams[stream][0].name
                raise CalibrationError(
                    f"no token reached {name} in round {numbers.index(0)} of {len(numbers)}; batches are dealt to the "
                    "rounds in turn. Take fewer rounds, more batches, or batches that have inputs for every tower"
                )

    def _reached(self) -> dict[str, list[int]]:
        """Stream -> tokens of each round; of an expert those of its pool, which stands in where it saw none."""
        counts = {
            stream: [s.count for s in sums] or [0] * self.rounds
            for stream, sums in self._sums.items()
        }
        pools: dict[str, dict[str, list[int]]] = {}
        for site in self.sites:
            if site.pool is not None:
                pools.setdefault(site.pool, {})[site.stream] = counts[site.stream]
        for members in pools.values():
            together = [sum(numbers) for numbers in zip(*members.values(), strict=True)]
            counts |= dict.fromkeys(members, together)
        return counts


def _inside_backward() -> bool:
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1
