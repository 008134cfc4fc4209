"""The basis: extreme left singular vectors of `G = W K`, or extreme eigenvectors of `C'`.

"exact" reads the whole spectrum of `G G^T` in float64, and takes the SVD of `G` where the chosen components
are too small for a squared form. "fast" never squares: it iterates a block with triangular factors of `W`,
`C'` or `G` (inverse iteration for the smallest). Its factors are float64 wherever rounding could reach the
chosen components; its rounds need not be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.decompose.orient import Root

Components = Literal["smallest", "largest"]

EXTRA = 16  # vectors iterated beside the r wanted: they decide the rate of convergence
# Iteration ends when a round gains less than this share of the squared energy; what is left is of that size. The
# layers of a CLIP take 3 to 15 rounds; flat spectra, as of random matrices, are the slowest.
TOLERANCE = 5e-4
ROUNDS = 30  # at most
LIGHT_ROUNDS = 15  # at most in float32, before float64 takes over
# An eigenvalue of G G^T below this share of the largest has lost too many digits to float64 rounding.
SQUARED_LIMIT = 1e-10
# A triangular factor whose diagonal falls below this share of its largest entry is not taken from `W^T W`.
GRAM_LIMIT = 1e-4
GRAM_PANEL = 192  # its rows that are multiplied at once
# Float32 rounding of G may reach this share of the chosen energy. It adds in quadrature: half a percent at most.
LIGHT_LIMIT = 0.1


@dataclass(frozen=True)
class Basis:
    """Attributes in units where `‖W‖_F = 1` and `C'` has mean diagonal 1.

    vectors: orthonormal, each with its largest entry positive.
    values: of `G` (or of `C'^power`, on the input side) for each vector, descending.
    spectrum: all values; None where only the chosen ones were computed.
    total_energy: `‖G‖_F`.
    """

    vectors: Float[Tensor, "d r"]
    values: Float[Tensor, " r"]
    spectrum: Float[Tensor, " n"] | None
    total_energy: float


def float64_device(tensor: Tensor) -> torch.device:
    """Where to compute in float64: the tensor's own device, or the CPU where that has none (mps)."""
    return tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")


def worth_iterating(size: int, rank: int) -> bool:
    """Whether the fast route pays: measured on one thread, it does not below some 200 rows."""
    return size >= 256 and 4 * (rank + EXTRA) <= size


# ---- the output side -----------------------------------------------------------------------------------


class _Tall:
    """`W = Q R` for out >= inp, without forming Q.

    Without it the smallest directions of `G G^T` would be the null space of `W^T`, where `W` has nothing.
    """

    def __init__(self, w: Float[Tensor, "out inp"]) -> None:
        self.w = w
        self.out, self.inp = w.shape
        self.reflectors = None
        if self.out >= 2 * self.inp:
            # The Cholesky factor of W^T W is R too, at half the time, where squaring W costs no digits that count.
            self.r, failed = torch.linalg.cholesky_ex(_gram(w), upper=True)
            diagonal = self.r.diagonal()
            if not failed and float(diagonal.min()) > GRAM_LIMIT * float(diagonal.max()):
                return
        self.reflectors, self.tau = torch.geqrf(w)
        self.r = self.reflectors[: self.inp].triu()  # (inp, inp)

    def lift(self, x: Float[Tensor, "inp r"]) -> Float[Tensor, "out r"]:
        """`Q x`."""
        if self.reflectors is None:
            lifted = self.w @ torch.linalg.solve_triangular(self.r, x, upper=True)
            return torch.linalg.qr(lifted).Q  # against the rounding of the solve
        padded = x.new_zeros(self.out, x.shape[1])
        padded[: self.inp] = x
        return torch.ormqr(self.reflectors, self.tau, padded)


def _gram(w: Float[Tensor, "out inp"]) -> Float[Tensor, "inp inp"]:
    """The upper triangle of `W^T W`, in row panels; what is below it is not defined."""
    gram = w.new_empty(w.shape[1], w.shape[1])
    for i in range(0, len(gram), GRAM_PANEL):
        torch.mm(w[:, i : i + GRAM_PANEL].mT, w[:, i:], out=gram[i : i + GRAM_PANEL, i:])
    return gram


def output_exact(
    w: Float[Tensor, "out inp"], root: Root, rank: int, components: Components
) -> Basis:
    """Left singular vectors of `G` from its whole spectrum."""
    tall = _Tall(w) if w.shape[0] > w.shape[1] else None
    g = root.times(w if tall is None else tall.r)  # (n, inp), n = min(out, inp)
    squared, vectors = torch.linalg.eigh(g @ g.mT)
    squared, vectors = squared.flip(0), vectors.flip(1)  # descending
    values = squared.clamp_min(0).sqrt()
    chosen = _select(values, rank, components)
    if float(squared[chosen].mean()) < SQUARED_LIMIT * float(squared[0]):
        # The squared form has lost these components; G itself has not. Its triangular factor has the
        # same left singular vectors and is square.
        vectors, values, _ = torch.linalg.svd(torch.linalg.qr(g.mT, mode="r").R.mT)
    u = vectors[:, chosen] if tall is None else tall.lift(vectors[:, chosen])
    return Basis(fix_signs(u), values[chosen], values, float(torch.linalg.norm(values)))


def output_fast(
    w: Float[Tensor, "out inp"], root: Root, rank: int, components: Components, seed: int
) -> Basis | None:
    """The chosen left singular vectors of `G` by block iteration; None where it cannot: a singular `C'`."""
    out, inp = w.shape
    smallest = components == "smallest"
    if smallest and out >= inp and root.c is not None and root.factor() is None:
        return None
    tall = _Tall(w) if out > inp and smallest else None
    core = w if tall is None else tall.r  # G = Q core K, core (n, inp)
    light = root.times(core.float())  # core K in float32: enough for the largest, and for the total
    total = float(torch.linalg.norm(light))
    start = _start(core, rank, seed)

    def ritz(x: Tensor) -> Basis:
        x = torch.linalg.qr(x.to(core)).Q
        u, values = _ritz(x, root.times(x.mT @ core).mT, rank, components)
        return Basis(fix_signs(u if tall is None else tall.lift(u)), values, None, total)

    if not smallest:
        return ritz(_iterate(lambda x: light @ (light.mT @ x), start.float(), rank, components))
    if out >= inp:
        # The factors of W and of C' apart, so that their condition numbers do not multiply.
        del light
        step = _Apart(core, root, triangular=tall is not None)
        x = _iterate(step, start.float(), rank, components, LIGHT_ROUNDS)
        # float32 rounding leaves a trace of the largest directions in x, which the first of these takes out
        return ritz(_iterate(step, x.to(core), rank, components))
    # Wide: the triangular factor of G^T. QR of G rather than Cholesky of G G^T: no squares.
    basis = ritz(_iterate(_solve_joint(light), start.float(), rank, components))
    rounding = torch.finfo(light.dtype).eps * (rank / out) ** 0.5 * (root.norm or inp**0.5)
    if rounding <= LIGHT_LIMIT * float(torch.linalg.norm(basis.values)):
        return basis
    del light
    return ritz(_iterate(_solve_joint(root.times(core)), start, rank, components))


class _Apart:
    """x -> `(G G^T)^-1 x = core^-T (K K^T)^-1 core^-1 x` for `G = core K`, in the precision of x.

    The factors are of float64, also those that are then rounded to float32.
    """

    def __init__(self, core: Float[Tensor, "n n"], root: Root, *, triangular: bool) -> None:
        self.root, self.pivots = root, None
        if triangular:
            factors = core.clone()
        else:
            factors, self.pivots, _ = torch.linalg.lu_factor_ex(core)  # half the work of a QR
        self.factors = {d: _no_zero_pivots(factors.to(d)) for d in (core.dtype, torch.float32)}

    def __call__(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        factors = self.factors[x.dtype]
        if self.pivots is None:
            y = self.root.solve(torch.linalg.solve_triangular(factors, x, upper=True))
            return torch.linalg.solve_triangular(factors.mT, y, upper=False)
        y = self.root.solve(torch.linalg.lu_solve(factors, self.pivots, x))
        return torch.linalg.lu_solve(factors, self.pivots, y, adjoint=True)


def _solve_joint(g: Float[Tensor, "out inp"]) -> Callable[[Tensor], Tensor]:
    """x -> `(G G^T)^-1 x = (R^T R)^-1 x` for `G^T = Q R`."""
    r = _no_zero_pivots(torch.linalg.qr(g.mT, mode="r").R)  # (out, out)

    def step(x: Tensor) -> Tensor:
        y = torch.linalg.solve_triangular(r.mT, x, upper=False)
        return torch.linalg.solve_triangular(r, y, upper=True)

    return step


# ---- the input side ------------------------------------------------------------------------------------


def input_exact(
    w: Float[Tensor, "out inp"], root: Root, rank: int, components: Components
) -> Basis:
    """Eigenvectors of `C'`."""
    values, vectors = torch.linalg.eigh(root.damped())
    values, vectors = values.flip(0).clamp_min(0) ** root.power, vectors.flip(1)  # descending
    chosen = _select(values, rank, components)
    total = float(torch.linalg.norm(root.times(w.float())))
    return Basis(fix_signs(vectors[:, chosen]), values[chosen], values, total)


def input_fast(
    w: Float[Tensor, "out inp"], root: Root, rank: int, components: Components, seed: int
) -> Basis | None:
    """The chosen eigenvectors of `C'` by block iteration; None where it cannot: a singular `C'`."""
    c = root.damped()
    # C'^2 or its inverse: a round gains as much as one on the output side
    square = Root(c, 1.0, 0.0, c.device)
    if components == "smallest" and square.factor() is None:
        return None
    step = square.solve if components == "smallest" else lambda y: c @ (c @ y)
    x = _iterate(step, _start(c, rank, seed), rank, components)
    p, values = _ritz(x, c @ x, rank, components)
    total = float(torch.linalg.norm(root.times(w.float())))
    return Basis(fix_signs(p), values**root.power, None, total)


# ---- block iteration -----------------------------------------------------------------------------------


def _start(like: Float[Tensor, "n m"], rank: int, seed: int) -> Float[Tensor, "n k"]:
    size = like.shape[0]
    # drawn on the CPU, so that a GPU starts from the same block
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, min(size, rank + EXTRA), generator=generator, dtype=torch.float64)
    return x.to(like)


def _iterate(
    step: Callable[[Tensor], Tensor],
    x: Float[Tensor, "n k"],
    rank: int,
    components: Components,
    rounds: int = ROUNDS,
) -> Float[Tensor, "n k"]:
    """Orthonormal block, turned to the dominant invariant subspace of `step`.

    `step` is `G G^T` for the largest components and its inverse for the smallest: the singular values of
    the block it returns tell the energy reached so far.
    """
    last = math.inf
    for _ in range(rounds):
        x, r = torch.linalg.qr(step(x))
        values = torch.linalg.svdvals(r)[:rank].double()
        energy = float((values if components == "largest" else 1 / values).sum())
        if abs(energy - last) <= TOLERANCE * energy:
            break
        last = energy
    return x


def _ritz(
    x: Float[Tensor, "n k"], image: Float[Tensor, "m k"], rank: int, components: Components
) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"]]:
    """Rayleigh-Ritz: the chosen left singular vectors of G within span(x), given `G^T x`; x orthonormal."""
    _, values, rotation = torch.linalg.svd(image, full_matrices=False)
    chosen = _select(values, rank, components)
    return x @ rotation.mT[:, chosen], values[chosen]


def _no_zero_pivots(r: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """`r`, in place, with its diagonal at least one rounding error, so that it can be solved with.

    The change is of the size of the factorisation's own rounding. Inverse iteration wants exactly the
    directions that such a solve blows up.
    """
    diagonal, eps = r.diagonal(), torch.finfo(r.dtype).eps
    least = eps * diagonal.abs().max().clamp_min(eps)  # ‖W‖ is 1, or 0
    diagonal.copy_(torch.where(diagonal.abs() < least, least, diagonal))
    return r


def _select(values: Tensor, rank: int, components: Components) -> slice:
    """The chosen ones of descending values."""
    return slice(0, rank) if components == "largest" else slice(len(values) - rank, len(values))


def fix_signs(vectors: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
    """Each column with its largest entry positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, r)
    return vectors * torch.where(largest < 0, -1.0, 1.0)
