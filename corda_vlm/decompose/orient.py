"""The orienting matrix `C'^power`, never formed where a factor of it will do."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from corda_vlm.errors import CordaError

_ROUNDING = torch.finfo(torch.float32).eps  # of the activations that C was summed from
_PANEL = 2048  # columns converted to another dtype at a time


class Root:
    """K with `K K^T = (C' / v)^(2 power)`: `C' / v`, its Cholesky factor or the inverse of that transposed, or the identity.

    `W K` has the left singular vectors of `W C'^power`, whichever K. The unit v, the mean diagonal of `C'`,
    keeps every power within float32.

    Attributes:
        c: C as it was given, in float32 or float64; None stands for the identity.
        power: -0.5, 0, 0.5 or 1; 0 where c is None.
        unit: v.
        scale: `v^power`: what `C'^power` has more than `K`.
        norm: `‖K‖_F` (at power 1 without the damping); None for the identity, whose size is not known here.
        damping, device: δ, and where it computes.
        resolution: what rounding alone gives `K` in a direction in which C has nothing.

    Weights that read one stream share its root, and so the one factor of its covariance.
    """

    def __init__(
        self,
        covariance: Float[Tensor, "inp inp"] | None,
        power: float,
        damping: float,
        device: torch.device,
    ) -> None:
        self.c, self.power, self.scale, self.resolution = None, 0.0, 1.0, 0.0
        self.norm: float | None = None
        self.damping, self.device = damping, device
        self._factor: Tensor | None = None
        self._light: Tensor | None = None
        if covariance is None or power == 0:
            return
        c = covariance.detach().to(device)
        self.c = c if c.dtype in (torch.float32, torch.float64) else c.float()
        self.power = power
        mean = float(c.diagonal().mean(dtype=torch.float64))
        self._damping = damping / (1 + damping) if mean > 0 else 0.0  # of C' / v
        self.unit = mean * (1 + damping) or 1.0
        self.scale = self.unit**power
        norm = float(torch.linalg.norm(self.c)) / self.unit
        self.norm = norm if power == 1 else len(c) ** 0.5
        # Rounding each entry to the dtype it came in perturbs the eigenvalues by about this much.
        rounding = torch.finfo(covariance.dtype).eps * norm / len(c) ** 0.5
        self.resolution = rounding**power if power > 0 else 0.0

    @classmethod
    def of(
        cls,
        covariance: Float[Tensor, "inp inp"] | Root | None,
        power: float,
        damping: float,
        device: torch.device,
    ) -> Root:
        """The root of a covariance, or the one that was made of it beforehand.

        Raises:
            CordaError: that one has another power or damping.
        """
        if not isinstance(covariance, Root):
            return cls(covariance, power, damping, device)
        if (covariance.power, covariance.damping) != (power, damping):
            raise CordaError(
                f"the root was made with power {covariance.power} and damping {covariance.damping}, and power {power} and damping "
                f"{damping} are asked for; make one with these"
            )
        return covariance

    def damped(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "inp inp"]:
        """`C' / v`."""
        assert self.c is not None
        damped = self.c.to(dtype, copy=True).div_(self.unit)
        damped.diagonal().add_(self._damping)
        return damped

    def factor(self) -> Float[Tensor, "inp inp"] | None:
        """Lower Cholesky factor of `C' / v`, float64; None where it is singular."""
        if self._factor is None and self.c is not None:
            factor, failed = torch.linalg.cholesky_ex(self.damped())
            self._factor = None if failed else factor
        return self._factor

    def times(self, x: Float[Tensor, "n inp"]) -> Float[Tensor, "n inp"]:
        """`X K`, in the dtype of x."""
        if self.c is None:
            return x
        if self.power == 1:
            return _product(x, self.c).div_(self.unit).add_(x, alpha=self._damping)
        factor = self.factor()
        if self.power < 0:
            if factor is None:
                values, vectors = self._floored()
                return _product(x, vectors / values.sqrt())
            # in float64: the small directions of C' are what counts here
            return torch.linalg.solve_triangular(factor, x.mT.to(factor), upper=False).mT.to(x)
        if factor is None:  # any square root will do
            values, vectors = torch.linalg.eigh(self.damped())
            factor = vectors * values.clamp_min(0).sqrt()
        return _product(x, factor)

    def inverse(self, y: Float[Tensor, "inp k"]) -> Float[Tensor, "inp k"]:
        """`(C' / v)^-1 y`, float64; where C' is singular its eigenvalues are held above rounding."""
        factor = self.factor()
        if factor is None:
            values, vectors = self._floored()
            return vectors @ ((vectors.mT @ y.to(vectors)) / values[:, None])
        y = torch.linalg.solve_triangular(factor, y.to(factor), upper=False)
        return torch.linalg.solve_triangular(factor.mT, y, upper=True)

    def _floored(self) -> tuple[Float[Tensor, " inp"], Float[Tensor, "inp inp"]]:
        """Eigenvalues of `C' / v`, none below one rounding of the largest, and eigenvectors."""
        values, vectors = torch.linalg.eigh(self.damped())
        largest = float(values[-1])
        # of zeros alone every direction is alike
        return values.clamp_min(_ROUNDING * largest if largest > 0 else 1.0), vectors

    def solve(self, y: Float[Tensor, "inp k"]) -> Float[Tensor, "inp k"]:
        """`(K K^T)^-1 y`, in the dtype of y, for a `C'` that is not singular."""
        factor = self.factor()
        if factor is None:
            return y
        if y.dtype != factor.dtype:
            # rounded from float64: a float32 Cholesky of a badly conditioned C' would fail
            self._light = factor.to(y.dtype) if self._light is None else self._light
            factor = self._light
        for _ in range(round(2 * self.power)):
            # not `cholesky_solve`, which copies the factor at every call
            y = torch.linalg.solve_triangular(factor, y, upper=False)
            y = torch.linalg.solve_triangular(factor.mT, y, upper=True)
        return y


def _product(x: Float[Tensor, "n inp"], k: Float[Tensor, "inp inp"]) -> Float[Tensor, "n inp"]:
    """`x @ k` in the dtype of x; k is converted a panel at a time, since a copy may not fit."""
    if k.dtype == x.dtype:
        return x @ k
    out = torch.empty_like(x)
    for j in range(0, k.shape[1], _PANEL):
        torch.mm(x, k[:, j : j + _PANEL].to(x.dtype), out=out[:, j : j + _PANEL])
    return out
