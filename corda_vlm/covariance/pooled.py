"""The second moments of several processes become those of all rows together.

Each process has summed about a shift of its own, the mean of the first rows that it saw. Moved to one shift their means of `z zᵀ`
and of `z` are averaged, weighted by rows: this is what one process has that saw all of them, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from corda_vlm.covariance.moments import SecondMoment
from corda_vlm.distributed.agree import told_by_first, told_everywhere
from corda_vlm.distributed.deal import Share
from corda_vlm.distributed.sums import add_up, send_from


def home_of(layer: nn.Linear | nn.Conv2d, device: torch.device | str | None) -> torch.device:
    """Where the sums of a layer are that has seen no rows yet: where it was asked for, or else where the layer is."""
    if device is not None:
        return torch.device(device)
    there = layer.weight.device
    return torch.device("cpu") if there.type in ("meta", "mps") else there


def pool(moments: Sequence[SecondMoment]) -> None:
    """Give the first process the rows of all, and leave the others without any.

    Args:
        moments: of one dtype, and of the same sizes in the same order on every process.

    Raises:
        CordaError: another process has ended, or does not come.
    """
    share = Share.here()
    every = told_everywhere("the tokens counted", lambda: [moment.count for moment in moments])
    totals = [sum(counts) for counts in zip(*every, strict=True)]
    # Of those without rows there is nothing to send, and nothing to change.
    seen = [number for number, total in enumerate(totals) if total]
    if not seen:
        return
    shifts = [_shift(moments[n], [counts[n] for counts in every], share) for n in seen]
    add_up(shifts, torch.float64, everywhere=True)
    weights = [every[share.rank][n] / totals[n] for n in seen]

    def weighed() -> Iterator[Tensor]:
        for number, shift, weight in zip(seen, shifts, weights, strict=True):
            yield _weighed(moments[number], shift, weight)

    add_up(weighed(), moments[0].dtype)
    add_up((moments[number].mean for number in seen), torch.float64)
    for number in seen:
        if share.is_first:
            moments[number].count = totals[number]
            moments[number].release()
        else:
            moments[number].clear()


def share_out(moments: Sequence[SecondMoment]) -> None:
    """Give every process the rows of the first; otherwise as `pool`."""
    counts = told_by_first("the tokens counted", lambda: [moment.count for moment in moments])
    for moment, count in zip(moments, counts, strict=True):
        moment.count = count
    dtype = moments[0].dtype
    send_from(0, (moment.packed for moment in moments), dtype)
    send_from(0, (moment.shift for moment in moments), dtype)
    send_from(0, (moment.mean for moment in moments), torch.float64)


def _shift(moment: SecondMoment, counts: list[int], share: Share) -> Tensor:
    """The shift on the process whose becomes that of all, which is the first with rows; zeros on the others, for the sum."""
    first = next(rank for rank, count in enumerate(counts) if count)
    shift = moment.shift.double()
    return shift if first == share.rank else torch.zeros_like(shift)


def _weighed(moment: SecondMoment, shift: Tensor, weight: float) -> Tensor:
    """The packed triangle about the common shift, times this process's share of the rows, in place."""
    if weight:
        moment.recenter(shift.to(moment.shift))
    else:
        moment.clear()
        moment.shift.copy_(shift)
    moment.packed.mul_(weight)
    moment.mean.mul_(weight)
    return moment.packed
