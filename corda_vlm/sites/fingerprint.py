"""A hash by which files know the model that they were made from."""

from __future__ import annotations

import hashlib
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corda_vlm.families import Family, any_family, unwrap
from corda_vlm.families.layers.matrix import Matrix
from corda_vlm.sites.find import find_sites
from corda_vlm.sites.weights import all_matrices

_SAMPLES = 256  # weights of each site that the fingerprint looks at


def model_fingerprint(model: nn.Module, family: str | Family = "auto") -> str:
    """Hash of the sites' names, shapes and sampled weights: equal for one model in any dtype, packed or not.

    Of each weight matrix the signs of at most 256 evenly spaced entries go in: rounding to bfloat16 or float16
    keeps every sign, negative zeros included, while training turns some. Adapters of PEFT are not looked at, and neither
    is a convolution that reads the image itself, which of a model of no known family can be a site.
    """
    bare = unwrap(model)
    matrices = all_matrices(bare)
    digest = hashlib.sha256()
    of = any_family(bare) if family == "auto" else family
    for site in find_sites(bare, of):
        matrix = matrices[site.name]
        if _reads_pixels(matrix):
            continue
        digest.update(f"{site.name}:{matrix.shape};".encode())
        digest.update(bytes(_signs(matrix.read())))
    return digest.hexdigest()[:32]


def sampled(weight: Float[Tensor, "out inp"]) -> Float[Tensor, " n"]:
    """At most 256 evenly spaced entries, in row-major order."""
    flat = weight.reshape(-1)
    step = (
        max(1, flat.numel() // _SAMPLES) | 1
    )  # odd, so that it does not stay in one column of an even width
    return flat[::step][:_SAMPLES]


def _reads_pixels(matrix: Matrix) -> bool:
    """A convolution that reads at most four channels: the patch embedding of a ViT, which was no site once and is in no hash."""
    return matrix.kernel is not None and matrix.shape[1] <= 4 * math.prod(matrix.kernel)


def _signs(weight: Float[Tensor, "out inp"]) -> list[int]:
    return torch.signbit(sampled(weight)).cpu().to(torch.uint8).tolist()
