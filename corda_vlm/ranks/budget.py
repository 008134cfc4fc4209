"""Budgets of parameters, and floors and ceilings of ranks."""

from __future__ import annotations

from collections.abc import Mapping

from corda_vlm.errors import CordaError, UnknownNameError

Shape = tuple[int, int]


Bound = int | Mapping[str, int]


def uniform_budget(shapes: Mapping[str, Shape], rank: int) -> int:
    """Parameters of adapters of the same `rank` at every site: `Σ (out + inp) · rank`.

    The rank has to lie within 1 to `min(out, inp)` at every site.
    """
    for site, shape in shapes.items():
        if not 1 <= rank <= min(shape):
            raise CordaError(
                f"site {site!r}: rank {rank} is outside 1 to {min(shape)}, the full rank of its weight "
                f"{tuple(shape)}; choose a rank within, or leave the site out"
            )
    return rank * sum(map(sum, shapes.values()))


def check_budget(
    shapes: Mapping[str, Shape],
    budget: int,
    *,
    min_rank: Bound | None = None,
    max_rank: Bound | None = None,
) -> dict[str, tuple[int, int]]:
    """Site -> its lowest and highest rank, once it is clear that `budget` parameters can be shared out within.

    Needs no covariance, so that a request that cannot be is refused before hours of work.

    Raises:
        UnknownNameError: a floor or ceiling for a site that is not there.
        CordaError: a floor above its ceiling, or a budget below the floors or above the ceilings.
    """
    for what, bound in (("min_rank", min_rank), ("max_rank", max_rank)):
        for site in sorted(bound.keys() - shapes.keys()) if isinstance(bound, Mapping) else ():
            raise UnknownNameError(f"site in {what}", site, shapes)
    bounds = {site: bounds_of(site, shape, min_rank, max_rank) for site, shape in shapes.items()}
    least, most = (sum(sum(shapes[s]) * bounds[s][end] for s in shapes) for end in (0, 1))
    sites = f"{len(shapes)} site{'s' * (len(shapes) != 1)}"
    if budget < least:
        floors = max(low for low, _ in bounds.values())
        what = "one rank a site" if floors == 1 else f"their floors (min_rank, up to {floors})"
        raise CordaError(
            f"a budget of {budget:,} parameters is too small for {sites}: {what} takes {least:,}. Give at least "
            "that, lower the floors, or adapt fewer sites (towers=, roles=)"
        )
    if budget > most:
        full = all(high == min(shapes[s]) - 1 for s, (_, high) in bounds.items())
        what = "full rank less 1 everywhere" if full else "their ceilings (max_rank)"
        raise CordaError(
            f"a budget of {budget:,} parameters is too large for {sites}: {what} takes {most:,}. Give at most that"
            + ("" if full else ", or raise the ceilings")
        )
    return bounds


def bounds_of(
    site: str, shape: Shape, min_rank: Bound | None, max_rank: Bound | None
) -> tuple[int, int]:
    """The lowest and the highest rank that the site may be given."""
    top = min(shape) - 1
    low = min_rank.get(site, 1) if isinstance(min_rank, Mapping) else min_rank
    low = 1 if low is None else low
    high = max_rank.get(site, top) if isinstance(max_rank, Mapping) else max_rank
    high = top if high is None else min(high, top)
    if not 1 <= low <= high:
        raise CordaError(
            f"site {site!r}: no rank lies between its floor {low} (min_rank) and its ceiling {high} (max_rank; at "
            f"most {top}, full rank less 1); change them, or leave the site out"
        )
    return low, high
