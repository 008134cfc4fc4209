"""Which part of the work each process of a run does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from corda_vlm.distributed.agree import group_size, rank


@dataclass(frozen=True)
class Share:
    """One process's part of a sequence of batches: every `size`-th, from that of its rank on.

    Attributes:
        rank: its number, from 0.
        size: processes in all.
    """

    rank: int
    size: int

    @classmethod
    def here(cls) -> Share:
        """That of this process."""
        return cls(rank(), group_size())

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_all(self) -> bool:
        """Is there no other process?"""
        return self.size == 1

    def owns(self, number: int) -> bool:
        """Is the batch of this number its own?"""
        return number % self.size == self.rank

    def from_on(self, start: int) -> int:
        """The first of its own numbers that is not below `start`."""
        return start + (self.rank - start) % self.size


ALONE = Share(0, 1)
"""All of the work."""


def dealt(costs: Mapping[str, float], share: Share) -> list[str]:
    """What this process has of pieces of work of different costs: the largest first, each to who has least so far.

    Every process that is given the same costs deals alike, so that nobody has to ask.

    Returns:
        its own pieces, in the order of `costs`.
    """
    loads = [0.0] * share.size
    own: set[str] = set()
    for piece in sorted(costs, key=lambda piece: -costs[piece]):  # equals in their order
        least = loads.index(min(loads))
        loads[least] += costs[piece]
        if least == share.rank:
            own.add(piece)
    return [piece for piece in costs if piece in own]
