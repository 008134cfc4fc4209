"""Which covariance and which rank each site takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm import ranks
from corda_vlm.covariance import CovarianceStore
from corda_vlm.decompose import Root
from corda_vlm.distributed.values import dealt_out
from corda_vlm.errors import CordaError
from corda_vlm.sites import SiteWeights

Key = tuple[str, int | None]  # stream, and its round or None for all pooled


class ChosenCovariances:
    """The covariance that each site takes, made dense when it is asked for.

    All of them at once would take several times the memory of the model.

    Attributes:
        rounds: site name -> its calibration round; None: all rounds pooled, or no data.
        selections: site name -> how its round was chosen, under `dynamic_covariance`.
    """

    def __init__(
        self,
        store: CovarianceStore | None,
        rounds: Mapping[str, int | None],
        selections: Mapping[str, ranks.Selection],
        damping: float,
    ) -> None:
        self.rounds, self.selections = rounds, selections
        self._store, self._damping = store, damping
        self._last: tuple[Key, Tensor] | None = None
        self._root: Root | None = None  # of the last
        self._compactness: dict[Key, float] = {}  # of a weight of one row

    def __getitem__(self, site: str) -> Float[Tensor, "inp inp"] | None:
        if self._store is None:
            return None
        key = self._key(site)
        if self._last is None or self._last[0] != key:
            stream, index = key
            self._last = self._root = None  # freed before the next is made
            if index is None:
                matrix = self._store[site].matrix
            else:
                matrix = self._store.entries(stream)[index].read().matrix()
            self._last = (key, matrix)  # q, k and v follow one another and share it
        return self._last[1]

    def root(self, site: str, power: float, device: torch.device) -> Root | None:
        """The root of the site's covariance; sites of one stream that follow one another share it, and so its factor."""
        covariance = self[site]
        if covariance is None:
            return None
        if self._root is None or (self._root.power, self._root.device) != (power, device):
            self._root = None  # freed before the next is made
            self._root = Root(covariance, power, self._damping, device)
        return self._root

    def groups(self, sites: Iterable[str]) -> dict[str, list[str]]:
        """The sites that share a covariance, by the first of them, so that it is made once for all."""
        by_key: dict[Key | str, list[str]] = {}
        for site in sites:
            by_key.setdefault(site if self._store is None else self._key(site), []).append(site)
        return {members[0]: members for members in by_key.values()}

    def scores(self, site: str) -> tuple[float, ...] | None:
        """`ranks.selection_score` of every candidate round; None where there was no choice."""
        return self.selections[site].scores if site in self.selections else None

    def tokens(self, site: str) -> int | None:
        """How many the site itself saw, of the rounds that it takes; None without data."""
        if self._store is None:
            return None
        counts, index = self._store.counts(site), self.rounds[site]
        return sum(counts) if index is None else counts[index]

    def is_pooled(self, site: str) -> bool:
        """Whether that was too few, so that it takes the covariance of its layer's experts."""
        return self._store is not None and site in self._store.pooled

    def compactness(self, site: str, out: int) -> float | None:
        """π of the site's covariance, see `SitePlan.compactness`; all eigenvalues of C', once for each stream.

        Args:
            out: rows of the site's weight.

        Raises:
            CordaError: C' is singular, as without damping it may be.
        """
        if self._store is None:
            return None
        if site in self.selections:
            return self.selections[site].compactness
        key = self._key(site)
        if key not in self._compactness:
            covariance = self[site]
            assert covariance is not None
            try:
                self._compactness[key] = ranks.compactness(covariance, 1, damping=self._damping)
            except CordaError as error:
                raise CordaError(f"site {site!r}: {error}") from error
        return self._compactness[key] * math.sqrt(out)

    def _key(self, site: str) -> Key:
        assert self._store is not None
        return self._store.stream_of(site), self.rounds[site]


def choose_covariances(
    weights: SiteWeights,
    store: CovarianceStore | None,
    damping: float,
    dynamic: bool,
) -> ChosenCovariances:
    """The store's covariances for the sites of `weights`: pooled, or with `dynamic` each site's best round.

    One round of one stream is dense at a time.

    Raises:
        CordaError: a site that was not calibrated, or nothing to choose from.
    """
    rounds: dict[str, int | None] = dict.fromkeys(weights)
    if store is None:
        return ChosenCovariances(None, rounds, {}, damping)
    streams: dict[str, list[str]] = {}
    for site in weights:
        if site not in store.site_streams:
            known = ", ".join(sorted(store.site_streams)[:4])
            raise CordaError(
                f"site {site!r} was not calibrated (the store has {len(store.site_streams)} sites: {known}, …); "
                "collect covariances for it too, or leave it out with towers= or roles="
            )
        streams.setdefault(store.stream_of(site), []).append(site)
    selections: dict[str, ranks.Selection] = {}
    if dynamic:
        if store.round_count == 1:
            raise CordaError(
                "dynamic_covariance chooses among calibration rounds, and these covariances hold one; collect them "
                "with rounds=4 (calibrate --rounds 4), or leave dynamic_covariance off"
            )

        def select(stream: str) -> dict[str, ranks.Selection]:
            own = {site: weights[site] for site in streams[stream]}
            try:
                return ranks.select_covariance(_candidates(store, stream), own, damping=damping)
            except CordaError as error:
                raise CordaError(f"site {streams[stream][0]!r}: {error}") from error

        costs = costs_of(streams, weights.shapes)
        selections = dealt_out("rounds", streams, costs, select, (ranks.Selection,))
        rounds = {site: selections[site].index for site in weights}
    return ChosenCovariances(store, rounds, selections, damping)


def costs_of(
    groups: Mapping[str, Sequence[str]], shapes: Mapping[str, ranks.Shape]
) -> dict[str, float]:
    """What the decompositions of sites that share a covariance cost, in some unit: cubes of their widths."""

    def cost(members: Sequence[str]) -> float:
        products = [math.prod(shapes[site]) * min(shapes[site]) for site in members]
        return float(sum(products) + shapes[members[0]][1] ** 3)

    return {group: cost(members) for group, members in groups.items()}


def _candidates(store: CovarianceStore, stream: str) -> Iterator[Float[Tensor, "inp inp"]]:
    for entry in store.entries(stream):
        yield entry.read().matrix()


def rank_budget(
    shapes: Mapping[str, ranks.Shape],
    rank: int,
    *,
    dynamic_rank: bool,
    budget: int | None,
    min_rank: ranks.Bound | None,
    max_rank: ranks.Bound | None,
) -> int | None:
    """The parameters that `dynamic_rank` may share out, None without it; options that do not fit are refused.

    Raises:
        UnknownNameError: a floor or ceiling for a site that is not adapted.
        CordaError: a budget, floor or ceiling that cannot be kept, or given without `dynamic_rank`.
    """
    if dynamic_rank:
        allowed = ranks.uniform_budget(shapes, rank) if budget is None else budget
        ranks.check_budget(shapes, allowed, min_rank=min_rank, max_rank=max_rank)
        return allowed
    given = {
        "budget": budget,
        "min_rank": None if min_rank == 1 else min_rank,
        "max_rank": max_rank,
    }
    if stray := [f"{name}={value}" for name, value in given.items() if value is not None]:
        raise CordaError(
            f"{', '.join(stray)} given without dynamic_rank: every site then takes rank {rank}. Add "
            "dynamic_rank=True (--dynamic-rank), or give rank= alone"
        )
    return None
