"""Watch what a change of the sites' outputs would do to the model's: hooks on outputs and their gradients.

One backward pass for each draw; gradients are taken of the layers' outputs alone, and each is added to its sum as
soon as it is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from corda_vlm.covariance.entries import Empty, Entry, placed
from corda_vlm.covariance.model_output import Output, Outputs, generator_of
from corda_vlm.covariance.moments import PRECISIONS, SecondMoment
from corda_vlm.covariance.output_side import OutputMoments
from corda_vlm.covariance.pooled import home_of
from corda_vlm.distributed.agree import is_first, told_by_first, told_everywhere
from corda_vlm.errors import CalibrationError
from corda_vlm.families import Batch
from corda_vlm.families.base import requiring
from corda_vlm.families.layers.conv2d import places_as_rows
from corda_vlm.families.layers.matrix import shape_of
from corda_vlm.sites import Site


@dataclass(frozen=True)
class OutputSide:
    """What of a calibration is about the output side.

    Attributes:
        outputs: runs the model, and says what it gives out.
        draws: of v for each output.
        data: fingerprint of the batches, which v is drawn by.
    """

    outputs: Outputs
    draws: int
    data: str


class OutputObserver:
    """Sums `g gᵀ` of each site while `run` runs batches; the part of an `Observer` that looks at outputs."""

    def __init__(
        self,
        asked: OutputSide,
        sites: Sequence[Site],
        precision: str,
        device: torch.device | str | None,
    ) -> None:
        self.asked, self.sites = asked, {site.name: site for site in sites}
        self.precision, self._device = precision, device
        self.consistent = True
        self._widths: dict[str, int] = {}
        self._homes: dict[str, torch.device] = {}
        self._sums: dict[str, Entry] = {}
        self._placed: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._handles: list[RemovableHandle] = []
        # of the batch in flight
        self._starts: list[Tensor] | None = None
        self._calls: Counter[str] = Counter()  # site -> gradients so far
        self.ahead: dict[str, int] = {}  # site -> gradients that are counted already

    def attach(self, layers: Mapping[str, nn.Linear | nn.Conv2d]) -> None:
        """Put the hooks on; site name -> layer."""
        for name, layer in layers.items():
            self._widths[name] = shape_of(layer)[0]
            self._homes[name] = home_of(layer, self._device)
            self._handles.append(layer.register_forward_hook(self._hook(name)))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._starts is None or not torch.is_grad_enabled():
                return None
            if not output.requires_grad:  # no parameter does: the gradient ends here
                start = output.new_zeros((), requires_grad=True)
                self._starts.append(start)
                output = output + start
            as_rows = places_as_rows if isinstance(module, nn.Conv2d) else _tokens_as_rows
            output.register_hook(lambda gradient: self._count(name, as_rows(gradient.detach())))
            return output

        return hook

    def run(self, model: nn.Module, batch: Batch, number: int) -> None:
        """Run a batch forwards once, and backwards for each draw."""
        self._calls.clear()
        counts: Counter[str] = Counter()
        with requiring(model), torch.enable_grad():
            self._starts = []
            try:
                outputs = self.asked.outputs(model, batch)
                for draw in range(self.asked.draws):
                    self._backward(outputs, number, draw)
                    for output in outputs:
                        counts.update(dict.fromkeys(self._fed_by(output), output.count))
            finally:
                self._starts = None
        self._counts.update(counts)
        self.ahead.clear()

    def _backward(self, outputs: Sequence[Output], number: int, draw: int) -> None:
        assert self._starts is not None
        generator = generator_of(self.asked.data, number, draw)
        value = torch.stack([output.draw(generator).cpu() for output in outputs]).sum()
        if value.requires_grad and self._starts:
            last = draw == self.asked.draws - 1
            torch.autograd.grad(value, self._starts, retain_graph=not last, allow_unused=True)

    def _fed_by(self, output: Output) -> list[str]:
        towers = output.towers
        return [name for name, site in self.sites.items() if towers is None or site.tower in towers]

    @torch.no_grad()
    def _count(self, name: str, rows: Float[Tensor, "n out"]) -> None:
        self._calls[name] += 1
        if self._calls[name] <= self.ahead.get(name, 0):
            return  # counted before the exception after which this batch is repeated
        if not bool(torch.isfinite(rows.abs().amax() if rows.numel() else torch.zeros(()))):
            raise CalibrationError(
                f"the gradient of what the model gives out by the output of {name!r} is NaN or Inf. None of it was counted; "
                "run the model in float32 or bfloat16"
            )
        self.consistent = False
        self._sum(name, rows).add(rows, self.precision)
        self.ahead[name] = self._calls[name]
        self.consistent = True

    def _sum(self, name: str, rows: Tensor) -> SecondMoment:
        if name not in self._placed:  # not before the device of the activations is known
            here = "cpu" if rows.device.type == "mps" else rows.device
            self._place(name, rows.shape[1], here if self._device is None else self._device)
        return self._sums[name].read()

    def _place(self, name: str, width: int, device: torch.device | str) -> None:
        entry = self._sums.get(name, Empty(width))
        self._sums[name] = placed(entry, PRECISIONS[self.precision], device, None)
        self._placed.add(name)

    # ------------------------------------------------------------------ the result

    def moments(self) -> OutputMoments:
        """What was counted. It shares the accumulators."""
        entries = {name: self._sums.get(name, Empty(w)) for name, w in self._widths.items()}
        counts = {name: self._counts[name] for name in self._widths}
        return OutputMoments(entries, counts, self.asked.draws)

    def start_from(self, moments: OutputMoments | None, ahead: Mapping[str, int]) -> None:
        """Go on from these sums, if any, and from this place in a batch."""
        if moments is not None:
            self._sums = {name: moments.entries[name] for name in self.sites}
            self._counts = Counter({name: moments.counts[name] for name in self.sites})
        self.ahead = dict(ahead)

    # ------------------------------------------------------------------ several processes

    def every(self) -> list[SecondMoment]:
        """All sums, in one order for all processes; made where there is none yet."""
        for name, width in self._widths.items():
            if name not in self._placed:
                self._place(name, width, self._homes[name])
        return [self._sums[name].read() for name in self._widths]

    def pool_counts(self) -> None:
        """Let the first process have the counts of all, and the others none."""
        every = told_everywhere(
            "the outputs counted", lambda: [self._counts[n] for n in self._widths]
        )
        total = [sum(counts) if is_first() else 0 for counts in zip(*every, strict=True)]
        self._counts = Counter(dict(zip(self._widths, total, strict=True)))

    def share_out_counts(self) -> None:
        """Let all processes have the counts of the first."""
        total = told_by_first(
            "the outputs counted", lambda: [self._counts[n] for n in self._widths]
        )
        self._counts = Counter(dict(zip(self._widths, total, strict=True)))

    def check_reached(self) -> None:
        """Raise `CalibrationError` where no gradient reached any site."""
        if not any(entry.count for entry in self._sums.values()):
            raise CalibrationError(
                "what the model gives out does not depend on any of the sites, so they have no output side; leave "
                "output_side out"
            )


def _tokens_as_rows(y: Float[Tensor, "*tokens out"]) -> Float[Tensor, "n out"]:
    return y.reshape(-1, y.shape[-1])
