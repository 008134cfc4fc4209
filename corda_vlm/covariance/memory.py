"""How much memory the covariances of a model's sites take while they are collected, told before the run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from corda_vlm.covariance.moments import PRECISIONS, packed_length
from corda_vlm.sites import Site, site_shapes

_MUCH = 0.5  # of what is free: from there on it is told how much that is


@dataclass(frozen=True)
class Memory:
    """Bytes of the sums.

    Attributes:
        streams: how many sums there are, one for each round of each stream.
        total: of all at once.
        block: of the largest part that `blockwise` holds at once: a block of the language model, or all before them.
        free: of the machine now; None where that cannot be told.
    """

    streams: int
    total: int
    block: int
    free: int | None

    def __str__(self) -> str:
        text = f"covariances of {self.streams:,} inputs take {_readable(self.total)} of memory"
        if self.block < self.total:
            text += f", {_readable(self.block)} with --blockwise"
        if self.free is not None and self.total > _MUCH * self.free:
            text += f"; {_readable(self.free)} are free"
        if self.free is not None and self.total > self.free:
            text += ", which is less: " + (
                "take --blockwise (blockwise: true)"
                if self.block < self.free
                else "adapt fewer sites (--roles, --targets)"
            )
        return text


def memory_of(
    model: nn.Module, sites: Sequence[Site], *, rounds: int = 1, precision: str = "float32"
) -> Memory:
    """What a calibration of these sites will take, without running anything.

    Of each stream a packed triangle is kept for each round; experts have streams of their own, so that a mixture takes many
    times what a dense model of its width does. Collected into a file with several rounds, those at rest are on the disk.
    """
    shapes = site_shapes(model, [site.name for site in sites])
    itemsize = PRECISIONS.get(precision, PRECISIONS["float32"]).itemsize
    widths = {site.stream: (_part(site), shapes[site.name][1]) for site in sites}
    parts: dict[str, int] = {}
    for part, width in widths.values():
        parts[part] = parts.get(part, 0) + rounds * packed_length(width) * itemsize
    return Memory(
        len(widths) * rounds, sum(parts.values()), max(parts.values(), default=0), _free()
    )


def _part(site: Site) -> str:
    """What blockwise holds at once: a block of the language model, or all that comes before."""
    return (
        f"block {site.block}" if site.tower == "language" and site.block is not None else "before"
    )


def _free() -> int | None:
    """What a process may take without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError, IndexError):  # not on every system
        return None


def _readable(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
