"""Sites: the weight matrices of a model that can be adapted, their names, weights, fingerprint and table."""

from __future__ import annotations

from corda_vlm.sites.find import Site, every_site, find_sites, lies_in, site_of
from corda_vlm.sites.fingerprint import model_fingerprint, sampled
from corda_vlm.sites.table import sites_table
from corda_vlm.sites.weights import (
    SiteWeights,
    get_layer,
    get_linear,
    site_shape,
    site_shapes,
    site_slices,
    site_weights,
)

__all__ = [
    "Site",
    "SiteWeights",
    "every_site",
    "find_sites",
    "get_layer",
    "get_linear",
    "lies_in",
    "model_fingerprint",
    "sampled",
    "site_of",
    "site_shape",
    "site_shapes",
    "site_slices",
    "site_weights",
    "sites_table",
]
