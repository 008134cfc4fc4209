"""The output side of a store: what a change of a layer's outputs does to what the model gives out.

Let f be what a model gives out: the unit embedding of an image or a text, or the distribution of a next token. Of a site with
outputs `y_t`, one for each token t of a record, it is

    G = E[Σ_t g_t g_tᵀ],  g_t = ∂⟨v, f⟩/∂y_t

where v is drawn at random: standard normal for an embedding; for a distribution v is such that `⟨v, f⟩` is the logarithm
of the probability of a token drawn from it (so that G is of the Fisher information). The mean is over outputs f and draws of v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.covariance.entries import Entry, pieces_of, stored
from corda_vlm.covariance.file import CovarianceFile, Pieces

_PREFIX = "output"


@dataclass(frozen=True)
class OutputMoments:
    """The G of sites, in memory or in a file.

    Attributes:
        entries: site -> the mean of `g_t g_tᵀ` over the tokens, padding included, whose gradient is zero.
        counts: site -> how many outputs f the gradients are of, each draw of v counted.
        draws: of v for each output.
    """

    entries: Mapping[str, Entry]
    counts: Mapping[str, int]
    draws: int

    def matrix(self, site: str) -> Float[Tensor, "out out"]:
        """G in float64, zero for a site that no gradient reached."""
        moment, count = self.entries[site].read(), self.counts[site]
        if not moment.count or not count:
            return torch.zeros(moment.size, moment.size, dtype=torch.float64)
        return moment.matrix().mul_(moment.count / count)

    def merged(self, other: OutputMoments) -> OutputMoments:
        """The outputs of both, as if they had been collected together."""
        entries = {
            site: entry.read().merged(other.entries[site].read())
            for site, entry in self.entries.items()
        }
        counts = {site: count + other.counts[site] for site, count in self.counts.items()}
        return OutputMoments(entries, counts, self.draws)

    def summary(self) -> str:
        sizes = [(entry.size, entry.dtype.itemsize) for entry in self.entries.values()]
        megabytes = sum(size * (size + 1) // 2 * bytes for size, bytes in sizes) / 1e6
        numbers = sorted(set(self.counts.values()))
        counts = "–".join(f"{number:,}" for number in dict.fromkeys((numbers[0], numbers[-1])))
        return f"output side: {len(self.entries)} sites, {counts} outputs, {megabytes:.1f} MB"

    # ------------------------------------------------------------------ files

    def about(self) -> dict[str, Any]:
        """What is in the header of a file."""
        sites = {
            site: {"size": entry.size, "rows": entry.count, "count": self.counts[site]}
            for site, entry in self.entries.items()
        }
        return {"draws": self.draws, "sites": sites}

    def pieces(self) -> dict[str, Pieces]:
        """Its tensors in a file."""
        tensors: dict[str, Pieces] = {}
        for site, entry in self.entries.items():
            tensors |= pieces_of(entry, f"{_PREFIX}/{site}")
        return tensors

    @classmethod
    def read(cls, file: CovarianceFile, about: Mapping[str, Any]) -> OutputMoments:
        """What `about` and `pieces` wrote; `KeyError`, `TypeError` or `ValueError` where the header does not fit."""
        sites = about["sites"]
        entries = {
            site: stored(file, f"{_PREFIX}/{site}", meta["size"], meta["rows"])
            for site, meta in sites.items()
        }
        return cls(entries, {site: meta["count"] for site, meta in sites.items()}, about["draws"])
