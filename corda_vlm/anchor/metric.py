"""Products with C, in the forms the anchor keeps it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.covariance import CovarianceStore
from corda_vlm.errors import ForeignFileError


@dataclass
class Metric:
    """`X -> X C` for one stream, with `C = F Fᵀ + rest`; the rest is dense (inp, inp), or a diagonal (inp,)."""

    factor: Float[Tensor, "inp m"]
    rest: Float[Tensor, "*inp inp"]

    def times(
        self, x: Float[Tensor, "n inp"], out: Float[Tensor, "n inp"] | None = None
    ) -> Float[Tensor, "n inp"]:
        """`X C` in float32, into `out` if given."""
        out = torch.empty_like(x) if out is None else out
        if self.factor.device != x.device:
            self.factor, self.rest = self.factor.to(x.device), self.rest.to(x.device)
        light = x.to(self.factor.dtype)
        y = (light @ self.factor) @ self.factor.T
        if self.rest.ndim == 2:
            return out.copy_(torch.addmm(y, light, self.rest))
        return torch.addcmul(y.float(), x, self.rest, out=out)

    @torch.no_grad()
    def sketch(self) -> list[float]:
        """`u C uᵀ` of a few fixed random u of unit size: of two other matrices they are others."""
        generator = torch.Generator().manual_seed(0)
        width = len(self.factor)
        u = torch.randn(_SKETCHED, width, generator=generator).to(self.rest.device) / width**0.5
        return (self.times(u) * u).sum(1, dtype=torch.float64).tolist()


class Metrics:
    """The metric of each stream, made once: C on the data of a store."""

    def __init__(self, store: CovarianceStore, energy: float) -> None:
        self.store, self.energy = store, energy
        self._made: dict[tuple[str, torch.dtype], Metric] = {}
        self._last: tuple[str, Tensor] | None = None

    def stream_of(self, site: str, width: int) -> str:
        """Sites of one stream have one metric."""
        return self.store.stream_of(site)

    def matrix(self, site: str, device: torch.device) -> Float[Tensor, "inp inp"]:
        """C in float64; the one asked for last is kept, for the next site that reads the same inputs."""
        stream = self.store.stream_of(site)
        if self._last is None or self._last[0] != stream:
            self._last = stream, self.store[site].matrix.to(device)
        return self._last[1]

    def row_energies(self, site: str, weight: Float[Tensor, "out inp"]) -> Float[Tensor, " out"]:
        """`w C wᵀ` for every row w, float64.

        Raises:
            ForeignFileError: C is of another width.
        """
        check_width(self.store, site, weight)
        weight = weight.float()
        product = weight @ self.matrix(site, weight.device).float()
        return (product * weight).sum(1, dtype=torch.float64)

    def of(
        self, site: str, width: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Metric:
        """The metric of a site's inputs, `width` of them."""
        key = self.store.stream_of(site), dtype
        if key not in self._made:
            matrix = self.matrix(site, device)
            truncated = _truncated(matrix, self.energy, dtype) if self.energy < 1 else None
            self._made[key] = truncated or _dense(matrix, dtype)
        return self._made[key]


class IdentityMetrics(Metrics):
    """All directions alike: what is left is the size of the weights."""

    def __init__(self) -> None:
        self.energy = 1.0

    def stream_of(self, site: str, width: int) -> str:
        return f"of width {width}"

    def row_energies(self, site: str, weight: Float[Tensor, "out inp"]) -> Float[Tensor, " out"]:
        return weight.float().square().sum(1, dtype=torch.float64)

    def of(
        self, site: str, width: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Metric:
        ones = torch.ones(width, device=device)
        return Metric(ones.new_zeros(width, 0, dtype=dtype), ones)


def _truncated(
    matrix: Float[Tensor, "inp inp"], energy: float, dtype: torch.dtype
) -> Metric | None:
    """C's largest components up to `energy` of its trace, and the diagonal of what remains.

    None where that is no cheaper than C: the factor takes two products where C takes one.
    """
    values, vectors = torch.linalg.eigh(matrix.float())
    values, vectors = values.clamp_min(0).flip(0), vectors.flip(1)
    kept = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    if 2 * kept > len(matrix):
        return None
    factor = vectors[:, :kept] * values[:kept].sqrt()
    rest = (matrix.diagonal().float() - factor.square().sum(1)).clamp_min(0)
    return Metric(factor.to(dtype), rest)


def _dense(matrix: Float[Tensor, "inp inp"], dtype: torch.dtype) -> Metric:
    """All of C, its few largest components apart.

    One direction, the mean, often holds most of C. Apart from the others its rounding in float32 does not cover what
    an adapter does in directions that the knowledge hardly uses.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), min(_APART, len(matrix)), generator=generator)
    basis = start.to(matrix)
    for _ in range(8):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, turn = torch.linalg.eigh(basis.T @ matrix @ basis)
    factor = (basis @ turn * values.clamp_min(0).sqrt()).to(dtype)
    # what the rounded factor leaves, so that the sum is C whatever the iteration has found
    rest = matrix - factor.to(matrix) @ factor.to(matrix).T
    return Metric(factor, rest.to(dtype))


_APART = 4
_SKETCHED = 3


def check_width(store: CovarianceStore, name: str, weight: Tensor) -> None:
    if (width := store.entries(store.stream_of(name))[0].size) != weight.shape[1]:
        raise ForeignFileError(
            f"the covariance of {name!r} is {width} wide, and the layer has {weight.shape[1]} inputs: the store is of "
            "another model"
        )
