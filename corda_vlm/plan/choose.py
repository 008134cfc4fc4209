"""Which covariance and which rank each site takes."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from corda_vlm import ranks
from corda_vlm.covariance import CovarianceStore
from corda_vlm.decompose import decompose
from corda_vlm.errors import CordaError


class ChosenCovariances:
    """The covariance that each site takes, made dense when it is asked for.

    All of them at once would take several times the memory of the model.

    Attributes:
        rounds: site name -> its calibration round; None: all rounds pooled, or no data.
    """

    def __init__(self, store: CovarianceStore | None, rounds: Mapping[str, int | None]) -> None:
        self.rounds, self._store = rounds, store
        self._last: tuple[tuple[str, int | None], Tensor] | None = None

    def __getitem__(self, site: str) -> Float[Tensor, "inp inp"] | None:
        if self._store is None:
            return None
        key = (self._store.stream_of(site), self.rounds[site])
        if self._last is None or self._last[0] != key:
            stream, index = key
            self._last = None  # freed before the next is made
            if index is None:
                matrix = self._store[site].matrix
            else:
                matrix = self._store.moments(stream)[index].matrix()
            self._last = (key, matrix)  # q, k and v follow one another and share it
        return self._last[1]


def choose_covariances(
    weights: Mapping[str, Tensor], store: CovarianceStore | None, damping: float, dynamic: bool
) -> ChosenCovariances:
    rounds: dict[str, int | None] = dict.fromkeys(weights)
    if store is None:
        return ChosenCovariances(None, rounds)
    for site, weight in weights.items():
        if site not in store.site_streams:
            known = ", ".join(sorted(store.site_streams)[:4])
            raise CordaError(
                f"site {site!r} was not calibrated (the store has {len(store.site_streams)} sites: {known}, …); "
                "collect covariances for it too, or leave it out with towers= or roles="
            )
        if dynamic:
            candidates = [c.matrix for c in store.rounds(site)]
            try:
                rounds[site], _ = ranks.select_covariance(candidates, weight, damping=damping)
            except CordaError as error:
                raise CordaError(f"site {site!r}: {error}") from error
    return ChosenCovariances(store, rounds)


def choose_ranks(
    weights: Mapping[str, Tensor],
    covariances: ChosenCovariances,
    mode: str,
    rank: int,
    damping: float,
    show_progress: bool,
) -> dict[str, int]:
    spectra, compactness = {}, {}
    for name, weight in tqdm(weights.items(), "spectra", disable=not show_progress, leave=False):
        covariance = covariances[name]
        assert covariance is not None
        # a first pass for the values alone: holding every site's whole basis would take the model's size
        factor = decompose(
            weight, covariance, rank=1, components="largest", damping=damping, route="exact"
        )
        assert factor.spectrum is not None
        spectra[name] = factor.spectrum
        compactness[name] = ranks.compactness(covariance, weight.shape[0], damping=damping)
    shapes = {name: (w.shape[0], w.shape[1]) for name, w in weights.items()}
    return ranks.allocate_ranks(spectra, compactness, shapes, mode=mode, uniform_rank=rank)
