"""How much each expert of a layer counts in an anchor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from corda_vlm.sites import Site


def shares_of_experts(
    names: Iterable[str],
    sites: Mapping[str, Site],
    size: Callable[[str], float],
    tokens: Callable[[str], int],
) -> dict[str, float]:
    """Name of each expert -> its share in its layer, which add up to 1; of other layers nothing.

    The experts of one matrix count as one layer, of which each token sees the matrices that it was sent to. The relative
    change of its outputs is `Σ_e n_e ‖ΔW_e C_e^½‖² / Σ_e n_e ‖W_e C_e^½‖²`, n_e being the tokens of expert e: so an expert's own
    relative change counts by `n_e ‖W_e C_e^½‖²`, and a layer with 128 experts no more than one without. One that saw no
    token counts as if it had seen one.

    Args:
        size: of a name, `‖W C^½‖²`.
        tokens: of a name, n_e.
    """
    layers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        site = sites.get(name)
        if site is not None and site.pool is not None:
            layers[site.pool, site.role].append(name)
    shares: dict[str, float] = {}
    for members in layers.values():
        energies = [max(tokens(name), 1) * size(name) for name in members]
        total = sum(energies)
        shares |= {
            name: energy / total if total > 0 else 1 / len(members)
            for name, energy in zip(members, energies, strict=True)
        }
    return shares
