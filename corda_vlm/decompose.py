"""Context-oriented decompositions of one weight matrix (CorDA, arXiv 2406.05223, section 3).

Pure tensor functions: no model, no file, no configuration.

A linear layer is `y = W x` with `W` of shape (out, inp); `C` (inp, inp) is the mean second moment of its
inputs and `C' = C + damping * mean(diag C) * I`. CorDA decomposes `W C' = U S V^T` and takes the adapter
`B = U_r S_r^1/2`, `A = S_r^1/2 V_r^T C'^-1`. No inverse is needed: `U^T W C' = S V^T` gives

    A = S_r^-1/2 U_r^T W,        B A = U_r U_r^T W,

so the adapter is `W` seen through r directions of its output, and only the left singular vectors of the
*oriented* matrix `G = W C'^power` have to be found. All members of the family differ in that basis alone:

    power 0    PiSSA (largest), MiLoRA (smallest)      `W W^T`            no data
    power 1/2  energy of the outputs                   `W C' W^T`
    power 1    CorDA: IPM (largest), KPM (smallest)    `W C'^2 W^T`
    side="input"  LoRA-Null, KORE (smallest)           `B A = W P P^T`, P eigenvectors of `C'`; at
                  power 0 P are the right singular vectors of `W`, and the sides agree

The smallest components are what KPM trains, and they are easily lost: `G G^T` squares the condition
number, and a float32 inverse and SVD of `G` return a subspace that holds several times the least energy.
Both routes below keep them. "exact" reads the spectrum of `G G^T` in float64, and takes the SVD of `G`
where the chosen components are too small for a squared form. "fast" never squares: it works with
triangular factors of `W`, `C'` or `G`, and iterates on a block (inverse iteration for the smallest).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.errors import CordaError, UnknownNameError

Components = Literal["smallest", "largest"]
Side = Literal["output", "input"]
Route = Literal["auto", "exact", "fast"]

EXTRA = 16  # vectors iterated beside the r wanted: they decide the rate of convergence
ROUNDS = 12  # rounds of block iteration; with EXTRA = 16 the energy is within 0.2 % of the optimum
# An eigenvalue of G G^T below this share of the largest has lost too many digits to float64 rounding.
SQUARED_LIMIT = 1e-10


@dataclass(frozen=True)
class Decomposition:
    """The initial adapter of one weight matrix; the frozen residual is `W - B @ A`.

    Attributes:
        B: (out, r), float32.
        A: (r, inp), float32.
        singular_values: (r,) descending, float64: of `W C'^power` for the chosen components; for
            side="input" the eigenvalues of `C'^power`.
        spectrum: (min(out, inp),) descending, or (inp,) for side="input"; None when the fast route
            computed the chosen components only.
        total_energy: `‖W C'^power‖_F`.
        chosen_energy: `‖B A C'^power‖_F`, in the units of `total_energy`.
        floored: components too small to be split as the paper does (see `decompose`).
        side: "output" (`B A = Q Q^T W`) or "input" (`B A = W P P^T`).
        route: "exact" or "fast": the one that was taken.
    """

    B: Float[Tensor, "out r"]
    A: Float[Tensor, "r inp"]
    singular_values: Float[Tensor, " r"]
    spectrum: Float[Tensor, " n"] | None
    total_energy: float
    chosen_energy: float
    floored: int
    side: Side
    route: Literal["exact", "fast"]

    @property
    def energy_share(self) -> float:
        """Share of the knowledge energy that the adapter holds: `‖B A C'^p‖_F² / ‖W C'^p‖_F²`, in [0, 1]."""
        return (self.chosen_energy / self.total_energy) ** 2 if self.total_energy > 0 else 0.0


def damp(covariance: Float[Tensor, "d d"], damping: float) -> Float[Tensor, "d d"]:
    """`C' = C + damping * mean(diag C) * I`, in the dtype of `covariance`; never changes its argument."""
    damped = covariance.clone()
    damped.diagonal().add_(damping * covariance.diagonal().mean())
    return damped


def knowledge_energy(
    delta: tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"]],
    covariance: Float[Tensor, "inp inp"],
) -> float:
    """`‖B A C‖_F` of `delta = (B, A)`, in float64.

    What KPM minimises and IPM maximises among all `Q Q^T W` of the same rank. Pass `damp(C, damping)` for
    the energy under `C'`.
    """
    b, a = (factor.double() for factor in delta)
    # ‖B Y‖ = ‖R_B Y‖ with B = Q R_B: an (r, inp) product, and no squares that cancel
    return float(torch.linalg.norm(torch.linalg.qr(b, mode="r").R @ (a @ covariance.double())))


def relative_damage(
    delta: tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"]],
    weight: Float[Tensor, "out inp"],
    covariance: Float[Tensor, "inp inp"],
) -> float:
    """`‖B A C^1/2‖_F² / ‖W C^1/2‖_F²`: the change of the layer's outputs on the knowledge, relative.

    1 when the adapter is the whole of `W`; 0 when it moves no output. Needs no square root of `C`.
    """
    b, a = (factor.double() for factor in delta)
    r = torch.linalg.qr(b, mode="r").R  # (r, r): ‖B Y‖ = ‖R Y‖
    ra = r @ a  # (r, inp)
    changed = float(((ra @ covariance.double()) * ra).sum())
    w = weight.double()
    whole = float(((w @ covariance.double()) * w).sum())  # tr(W C W^T)
    return changed / whole if whole > 0 else 0.0


def decompose(
    weight: Float[Tensor, "out inp"],
    covariance: Float[Tensor, "inp inp"] | None = None,
    *,
    rank: int,
    components: Components = "smallest",
    power: float = 1.0,
    side: Side = "output",
    damping: float = 1e-4,
    a_norm: float | None = None,
    route: Route = "auto",
    seed: int = 0,
) -> Decomposition:
    """The rank-r part of `weight` that an adapter starts from (CorDA, section 3.2 and equation 6).

    Args:
        weight: `W`, any floating dtype.
        covariance: mean second moment of the layer's inputs, symmetric; None only with power 0.
        rank: r, from 1 to min(out, inp).
        components: "smallest" (knowledge preserved, MiLoRA) or "largest" (instruction previewed, PiSSA).
        power: `W` is oriented by `C'^power`: 0, 0.5 or 1.
        side: "output" keeps directions of the output, "input" directions of the input.
        damping: δ in `C' = C + δ mean(diag C) I`.
        a_norm: None is the paper's split of Σ (`B = U Σ^1/2`); a number g brings every row of A to the
            norm g and the columns of B to the inverse. `B A` is the same, Adam's steps on it are not.
        route: "exact" (whole spectrum), "fast" (block iteration), "auto" (fast for a rank that is small
            against a matrix that is large).
        seed: of the block that the fast route starts from.

    The same arguments give the same result; each direction's sign makes its largest entry positive.

    A component whose singular value is lost in rounding has no `Σ^-1/2`. Where `W` still acts on it (a
    singular `C` without damping) the norms of A's row and B's column are balanced instead. Where `W` does
    not (rank-deficient or zero `W`), A's row is an orthonormal completion and B's column zero, which is
    how LoRA starts. Both are counted in `floored`, and `B A` is the projection of `W` all the same.

    Raises:
        CordaError: shapes, rank, NaN or Inf, a damping or a_norm out of range; the message names it.
        UnknownNameError: components, side or route.
    """
    _check(weight, covariance, rank, components, power, side, damping, a_norm, route)
    # float64 needs a device that has it
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    w = weight.detach().to(device, torch.float64)
    root, scale, resolution = _Root(None, 0), 1.0, 0.0
    if covariance is not None and power > 0:
        c = damp(covariance.detach().to(device, torch.float64), damping)
        variance = float(c.diagonal().mean()) or 1.0
        root = _Root(c.div_(variance), power)  # of unit mean, so that no power of it leaves float32
        scale = variance**power
        # rounding each entry of C to its dtype perturbs its eigenvalues by about this much
        rounding = torch.finfo(covariance.dtype).eps * float(torch.linalg.norm(c)) / len(c) ** 0.5
        resolution = rounding**power

    # Without C the sides agree: W P P^T = Q Q^T W for the singular vectors of W itself.
    on_input = side == "input" and root.c is not None
    size = w.shape[1] if on_input else min(w.shape)
    basis = None
    if route == "fast" or (route == "auto" and _worth_iterating(size, rank)):
        iterate = _input_basis_fast if on_input else _output_basis_fast
        basis = iterate(w, root, rank, components, seed)
    if basis is None:
        basis = (_input_basis_exact if on_input else _output_basis_exact)(w, root, rank, components)
    if on_input:
        b, a, floored = _split_input(w, basis, a_norm)
        chosen = (w @ basis.vectors) * basis.values  # W P Λ^power
    else:
        b, a, floored = _split_output(w, basis, scale, resolution, a_norm)
        chosen = basis.values
    return Decomposition(
        B=b.to(weight.device, torch.float32),
        A=a.to(weight.device, torch.float32),
        singular_values=scale * basis.values.cpu(),
        spectrum=None if basis.spectrum is None else scale * basis.spectrum.cpu(),
        total_energy=scale * basis.total_energy,
        chosen_energy=scale * float(torch.linalg.norm(chosen)),
        floored=floored,
        side=side,
        route="fast" if basis.spectrum is None else "exact",
    )


# ---- the basis -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Basis:
    vectors: Float[Tensor, "d r"]  # orthonormal
    values: Float[Tensor, " r"]  # descending
    spectrum: Float[Tensor, " n"] | None
    total_energy: float


def _worth_iterating(size: int, rank: int) -> bool:
    # Measured on one thread: below some 200 rows the whole spectrum costs no more than the iteration.
    return size >= 256 and 4 * (rank + EXTRA) <= size


def _select(values: Tensor, rank: int, components: Components) -> slice:
    """The chosen columns, of descending values."""
    return slice(0, rank) if components == "largest" else slice(len(values) - rank, len(values))


class _Root:
    """K with `K K^T = C'^(2 power)`: `C'` itself, its Cholesky factor, or the identity.

    `W K` has the left singular vectors of `W C'^power`, whichever K.
    """

    def __init__(self, c: Float[Tensor, "inp inp"] | None, power: float) -> None:
        self.c, self.power = c, power
        self._factor: Tensor | None = None

    def factor(self) -> Float[Tensor, "inp inp"] | None:
        """Lower Cholesky factor of `C'`; None where `C'` is singular."""
        if self._factor is None and self.c is not None:
            factor, failed = torch.linalg.cholesky_ex(self.c)
            self._factor = None if failed else factor
        return self._factor

    def times(self, x: Float[Tensor, "n inp"]) -> Float[Tensor, "n inp"]:
        """`X K`."""
        if self.c is None:
            return x
        if self.power == 1:
            return x @ self.c
        factor = self.factor()
        if factor is None:  # any square root will do
            values, vectors = torch.linalg.eigh(self.c)
            factor = vectors * values.clamp_min(0).sqrt()
        return x @ factor

    def solve(self, y: Float[Tensor, "inp k"]) -> Float[Tensor, "inp k"]:
        """`(K K^T)^-1 y`, for a definite `C'`."""
        factor = self.factor()
        if factor is not None:
            for _ in range(round(2 * self.power)):
                y = torch.cholesky_solve(y, factor)
        return y

    def to(self, dtype: torch.dtype) -> _Root:
        return _Root(None if self.c is None else self.c.to(dtype), self.power)


class _Tall:
    """`W = Q R` for out >= inp, with Q kept as reflectors.

    Without it the smallest directions of `G G^T` would be the null space of `W^T`, where `W` has nothing.
    """

    def __init__(self, w: Float[Tensor, "out inp"]) -> None:
        self.reflectors, self.tau = torch.geqrf(w)
        self.out, self.inp = w.shape
        self.r = self.reflectors[: self.inp].triu()  # (inp, inp)

    def lift(self, x: Float[Tensor, "inp r"]) -> Float[Tensor, "out r"]:
        """`Q x`."""
        padded = x.new_zeros(self.out, x.shape[1])
        padded[: self.inp] = x
        return torch.ormqr(self.reflectors, self.tau, padded)


def _output_basis_exact(w: Tensor, root: _Root, rank: int, components: Components) -> _Basis:
    """Left singular vectors of `G = W K` from its whole spectrum."""
    tall = _Tall(w) if w.shape[0] > w.shape[1] else None
    g = root.times(w if tall is None else tall.r)  # (n, inp), n = min(out, inp)
    squared, vectors = torch.linalg.eigh(g @ g.mT)
    squared, vectors = squared.flip(0), vectors.flip(1)  # descending
    values = squared.clamp_min(0).sqrt()
    chosen = _select(values, rank, components)
    if float(squared[chosen].mean()) < SQUARED_LIMIT * float(squared[0]):
        # The squared form has lost these components; G itself has not. Its triangular factor has the
        # same left singular vectors and is square.
        core = torch.linalg.qr(g.mT, mode="r").R.mT
        vectors, values, _ = torch.linalg.svd(core)
    u = vectors[:, chosen] if tall is None else tall.lift(vectors[:, chosen])
    return _Basis(_fix_signs(u), values[chosen], values, float(torch.linalg.norm(values)))


def _output_basis_fast(
    w: Tensor, root: _Root, rank: int, components: Components, seed: int
) -> _Basis | None:
    """The chosen left singular vectors of `G = W K` by block iteration; None where `C'` is singular."""
    out, inp = w.shape
    solve = components == "smallest"
    if solve and root.c is not None and root.factor() is None:
        return None
    tall = _Tall(w) if out > inp or (out == inp and solve) else None
    core = w if tall is None else tall.r  # G = Q core K, core (n, inp)

    if not solve:
        # What float32 rounds away is small against the largest. G is never formed.
        light = (core / torch.linalg.norm(core).clamp_min(torch.finfo(core.dtype).tiny)).float()
        light_root = root.to(torch.float32)

        def step(x: Tensor) -> Tensor:  # G G^T x
            y = light.mT @ x
            for _ in range(round(2 * root.power)):
                y = light_root.c @ y if light_root.c is not None else y
            return light @ y

        x = _iterate(step, light, rank, seed).to(core)
        image, total = root.times(x.mT @ core).mT, None
    elif tall is not None:
        # Square and tall: the factors of W and of C' apart, so their condition numbers do not multiply.
        r = _no_zero_pivots(core)

        def step(x: Tensor) -> Tensor:  # R^-T (K K^T)^-1 R^-1 x
            y = root.solve(torch.linalg.solve_triangular(r, x, upper=True))
            return torch.linalg.solve_triangular(r.mT, y, upper=False)

        x = _iterate(step, core, rank, seed)
        image, total = root.times(x.mT @ core).mT, None
    else:
        # Wide: the triangular factor of G^T. QR of G rather than Cholesky of G G^T: no squares.
        r = torch.linalg.qr(root.times(core).mT, mode="r").R  # (out, out), G G^T = R^T R
        pivots = _no_zero_pivots(r)

        def step(x: Tensor) -> Tensor:  # (R^T R)^-1 x
            y = torch.linalg.solve_triangular(pivots.mT, x, upper=False)
            return torch.linalg.solve_triangular(pivots, y, upper=True)

        x = _iterate(step, core, rank, seed)
        image, total = r @ x, float(torch.linalg.norm(r))

    u, values = _ritz(x, image, rank, components)
    u = u if tall is None else tall.lift(u)
    return _Basis(
        _fix_signs(u), values, None, _norm_of_product(core, root) if total is None else total
    )


def _input_basis_exact(w: Tensor, root: _Root, rank: int, components: Components) -> _Basis:
    """Eigenvectors of `C'`."""
    assert root.c is not None
    values, vectors = torch.linalg.eigh(root.c)
    values, vectors = values.flip(0).clamp_min(0) ** root.power, vectors.flip(1)  # descending
    chosen = _select(values, rank, components)
    return _Basis(_fix_signs(vectors[:, chosen]), values[chosen], values, _norm_of_product(w, root))


def _input_basis_fast(
    w: Tensor, root: _Root, rank: int, components: Components, seed: int
) -> _Basis | None:
    """The chosen eigenvectors of `C'` by block iteration; None where `C'` is singular."""
    c = root.c
    assert c is not None
    square = _Root(c, 1)  # iterating with C'^2 or its inverse, as the output side does
    if components == "smallest" and square.factor() is None:
        return None
    step = square.solve if components == "smallest" else lambda x: c @ (c @ x)
    x = _iterate(step, c, rank, seed)
    p, values = _ritz(x, c @ x, rank, components)
    return _Basis(_fix_signs(p), values**root.power, None, _norm_of_product(w, root))


def _iterate(
    step: Callable[[Tensor], Tensor], like: Float[Tensor, "n m"], rank: int, seed: int
) -> Float[Tensor, "n k"]:
    """Orthonormal block that `step`, repeated, has turned to its dominant invariant subspace."""
    size = like.shape[0]
    # drawn on the CPU, so that a GPU starts from the same block
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, min(size, rank + EXTRA), generator=generator, dtype=torch.float64)
    x = x.to(like)
    for _ in range(ROUNDS):
        x = torch.linalg.qr(step(x)).Q
    return x


def _ritz(
    x: Float[Tensor, "n k"], image: Float[Tensor, "m k"], rank: int, components: Components
) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"]]:
    """Rayleigh-Ritz: the chosen left singular vectors of G within span(x), given `G^T x`."""
    # x comes orthonormal only to the precision it was iterated in
    x, skew = torch.linalg.qr(x)
    image = torch.linalg.solve_triangular(skew, image, upper=True, left=False)
    _, values, rotation = torch.linalg.svd(image, full_matrices=False)
    chosen = _select(values, rank, components)
    return x @ rotation.mT[:, chosen], values[chosen]


def _no_zero_pivots(r: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """`r` with its diagonal at least one rounding error, so that a singular triangle can be solved with.

    The change is of the size of the factorisation's own rounding. Inverse iteration wants exactly the
    directions that such a solve blows up.
    """
    diagonal = r.diagonal()
    info = torch.finfo(r.dtype)
    smallest = info.eps * diagonal.abs().max().clamp_min(info.tiny / info.eps)
    r = r.clone()
    r.diagonal().copy_(torch.where(diagonal.abs() < smallest, smallest, diagonal))
    return r


def _norm_of_product(w: Tensor, root: _Root) -> float:
    """`‖W C'^power‖_F`. In float32: it is only divided by, and three digits are plenty."""
    if root.c is None:
        return float(torch.linalg.norm(w))
    w = w.float()
    product = w @ root.c.float()
    square = (product * (product if root.power == 1 else w)).sum()
    return math.sqrt(max(float(square), 0.0))


def _fix_signs(vectors: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
    """Each column with its largest entry positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, r)
    return vectors * torch.where(largest < 0, -1.0, 1.0)


# ---- the split into B and A ----------------------------------------------------------------------------


def _split_output(
    w: Tensor, basis: _Basis, scale: float, resolution: float, a_norm: float | None
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"], int]:
    """`B A = Q Q^T W`: `B = Q Σ^1/2`, `A = Σ^-1/2 Q^T W`, or rows of A at `a_norm`; Σ is `scale * values`.

    `resolution` is what rounding alone gives `C'^power` in any direction; 0 at power 0.
    """
    seen = basis.vectors.mT @ w  # (r, inp)
    norms = torch.linalg.vector_norm(seen, dim=1)  # (r,)
    # no component of W that float32 weights can hold
    dead = norms <= torch.finfo(torch.float32).eps * torch.linalg.norm(w)
    lost = dead | (basis.values <= norms * resolution)
    if a_norm is None:
        split = torch.where(
            lost, norms, scale * basis.values
        ).sqrt()  # balanced where Σ says nothing
    else:
        split = norms / a_norm
    split = torch.where(dead, 1.0, split)
    b = basis.vectors * torch.where(dead, 0.0, split)
    a = seen / split[:, None]
    if dead.any():
        a = _complete_rows(a, dead, a_norm)
    return b, a, int((lost if a_norm is None else dead).sum())


def _split_input(
    w: Tensor, basis: _Basis, a_norm: float | None
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r inp"], int]:
    """`B A = W P P^T`, balanced by its own SVD as LoRA-Null does (arXiv 2503.02659).

    With `W P = U S Z^T` the rows of `A` are `S^1/2 (P Z)^T`: orthogonal, and in the span of P.
    """
    u, s, z = torch.linalg.svd(w @ basis.vectors, full_matrices=False)  # (out, k), (k,), (k, r)
    rows = z @ basis.vectors.mT  # (k, inp); k = min(out, r)
    dead = s <= torch.finfo(torch.float32).eps * torch.linalg.norm(w)
    split = s.sqrt() if a_norm is None else s / a_norm
    typical = _typical(s.sqrt(), dead)
    b = u * torch.where(dead, 0.0, split)
    a_scale = torch.where(dead, typical, s.sqrt()) if a_norm is None else torch.full_like(s, a_norm)
    return b, rows * a_scale[:, None], int(dead.sum())


def _typical(norms: Tensor, dead: Tensor) -> Tensor:
    """Mean of the live norms; 1 where nothing is alive."""
    live = norms[~dead]
    return live.mean() if len(live) else norms.new_ones(())


def _complete_rows(
    a: Float[Tensor, "r inp"], dead: Tensor, a_norm: float | None
) -> Float[Tensor, "r inp"]:
    """`a` with its dead rows replaced by directions orthonormal to all others, of the live rows' norm."""
    live = a[~dead]
    count = int(dead.sum())
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(count, a.shape[1], generator=generator, dtype=torch.float64).to(a)
    # Householder QR completes the basis whatever the rank of `live`
    q = torch.linalg.qr(torch.cat([live, random]).mT).Q  # (inp, r)
    norms = torch.linalg.vector_norm(a, dim=1)
    scale = norms.new_full((), a_norm) if a_norm is not None else _typical(norms, dead)
    a = a.clone()
    a[dead] = scale * q[:, len(live) :].mT
    return a


# ---- what is refused -----------------------------------------------------------------------------------


def _check(
    weight: Tensor,
    covariance: Tensor | None,
    rank: int,
    components: str,
    power: float,
    side: str,
    damping: float,
    a_norm: float | None,
    route: str,
) -> None:
    for kind, name, choices in (
        ("components", components, ("smallest", "largest")),
        ("side", side, ("output", "input")),
        ("route", route, ("auto", "exact", "fast")),
        ("power", power, (0, 0.5, 1)),
    ):
        if name not in choices:
            raise UnknownNameError(kind, name, map(str, choices))
    if weight.ndim != 2 or 0 in weight.shape:
        raise CordaError(
            f"the weight has shape {tuple(weight.shape)}; a matrix (out, inp) is needed"
        )
    out, inp = weight.shape
    if not 1 <= rank <= min(out, inp):
        raise CordaError(
            f"rank {rank} is not between 1 and {min(out, inp)}, the smaller side of a {out}x{inp} weight; "
            "choose a smaller rank or leave this layer out"
        )
    if not (math.isfinite(damping) and damping >= 0):
        raise CordaError(f"damping {damping} must be a finite number, 0 or more (default 1e-4)")
    if a_norm is not None and not (math.isfinite(a_norm) and a_norm > 0):
        raise CordaError(
            f"a_norm {a_norm} must be a finite number above 0, or None for the paper's split"
        )
    _check_finite("weight", weight)
    if covariance is None:
        if power > 0:
            raise CordaError(f"power {power} needs a covariance; without data take power=0")
        return
    if covariance.shape != (inp, inp):
        raise CordaError(
            f"the covariance has shape {tuple(covariance.shape)}; a weight of {out}x{inp} needs ({inp}, {inp})"
        )
    _check_finite("covariance", covariance)
    if float(covariance.diagonal().min()) < 0:
        raise CordaError("the covariance has a negative diagonal entry: it is not a second moment")


def _check_finite(name: str, matrix: Tensor) -> None:
    if not matrix.is_floating_point():
        raise CordaError(f"the {name} is of {matrix.dtype}; a floating dtype is needed")
    # one NaN or Inf makes the sum NaN or Inf: no mask of the matrix's size
    if not math.isfinite(float(matrix.sum(dtype=torch.float64))):
        raise CordaError(f"the {name} holds NaN or Inf")
