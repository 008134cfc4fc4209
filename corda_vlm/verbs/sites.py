"""The verb sites: the layers of a model that can be adapted."""

from __future__ import annotations

from corda_vlm.experiment import checks
from corda_vlm.families.options import LoadOptions, SiteOptions
from corda_vlm.options import as_keywords
from corda_vlm.verbs.shared import load_source


def sites(model: str, *, full: bool = False, sites: SiteOptions, load: LoadOptions) -> None:
    """Print the weight matrices that can be adapted: towers, blocks, roles, shapes, streams.

    Example:
        corda-vlm sites emoji-clip --towers vision

    Args:
        model: A built-in name, a folder, or an id on a hub.
        full: One line a matrix.
    """
    checks.check_source(model)
    from corda_vlm.covariance.memory import memory_of
    from corda_vlm.sites import find_sites, sites_table

    loaded = load_source(model, load)
    chosen = find_sites(loaded.model, **as_keywords(sites, SiteOptions))
    print(sites_table(loaded.model, chosen, full=full))
    print(memory_of(loaded.model, chosen))
