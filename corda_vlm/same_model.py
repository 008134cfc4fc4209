"""Whether a file was made from this model: the same one, or the one that it is a quantised copy of.

`model_fingerprint` hashes signs of weights, and rounding to four or eight bits turns small weights into zeros, whose sign is none.
So files also keep a few of those signs themselves. A quantised copy has each of them, or a zero in its place; another model has
half of them, and one that training has changed by more than the rounding lacks some. A model that training changed by less than
that cannot be told from the original by its quantised copy, by this or by anything else.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from corda_vlm.errors import CordaError
from corda_vlm.families import any_family, unwrap
from corda_vlm.families.layers.quantized import storage_of
from corda_vlm.sites import find_sites, model_fingerprint, sampled, site_weights

logger = logging.getLogger(__name__)

_EVERY = 8  # of the entries that the fingerprint looks at: 32 a site, 11 characters
_PLAIN = "plain"


def model_signs(model: nn.Module) -> str:
    """How the weights are stored, and of each site the signs of some: `plain:` or `quantized:` and base64."""
    bare = unwrap(model)
    names = [site.name for site in find_sites(bare, any_family(bare))]
    kind = "quantized" if is_quantized(bare) else _PLAIN
    weights = site_weights(bare, names).values()
    signs = [_signs(weight if kind == _PLAIN else _told(weight)) for weight in weights]
    return f"{kind}:{base64.b64encode(_packed(signs)).decode()}"


def is_quantized(model: nn.Module) -> bool:
    """Does any layer keep its weight in fewer than sixteen bits?"""
    return any(storage_of(module) is not None for module in model.modules())


def need_original(model: nn.Module) -> None:
    """Raise a `CordaError` of a model whose weights are rounded already."""
    if is_quantized(model):
        raise CordaError(
            "the error of quantising is that against the original weights, and those of this model are quantised already: load it "
            "without quantization"
        )


def is_made_from(model: nn.Module, fingerprint: str, signs: str | None, what: str) -> bool:
    """Is it the model of this fingerprint, or a quantised copy of it, or what that is a quantised copy of? The latter two are logged.

    Args:
        signs: that `model_signs` gave of the model of the fingerprint; None of files of former versions, which fit the same model
            alone.
        what: was made from it, as the beginning of a sentence.
    """
    if model_fingerprint(model) == fingerprint:
        return True
    if signs is None or not _are_copies(own := model_signs(model), signs):
        return False
    relation = "of which this one is a quantised copy"
    if own.startswith(_PLAIN):
        relation = "which is a quantised copy of this one"
    elif not signs.startswith(_PLAIN):
        relation = "which is quantised from the same weights as this one"
    logger.info("%s: made from the model %s, %s", what, fingerprint, relation)
    return True


def _are_copies(one: str, other: str) -> bool:
    kinds, codes = zip(*(text.split(":", 1) for text in (one, other)), strict=True)
    if kinds[0] == kinds[1] == _PLAIN:
        return False
    a, b = (torch.frombuffer(bytearray(base64.b64decode(c)), dtype=torch.uint8) for c in codes)
    if a.shape != b.shape:
        return False
    a, b = _unpacked(a), _unpacked(b)
    seen = (a != _ZERO) & (b != _ZERO)
    return bool((a == b)[seen].all()) and bool(seen.float().mean() > 0.5)


_ZERO = 1
_BLOCK, _SMALL = 64, 0.01


def _told(weight: Tensor) -> Tensor:
    """A weight that was quantised, with zeros where its signs say nothing: in blocks that are tiny beside the largest.

    QLoRA rounds the blocks' scales too, to eight bits of the largest among them, so that one of a tiny block may come out negative and
    turn all signs of the block. Of random matrices with rows of very different sizes that were blocks of up to 0.4 % of the largest.
    """
    flat = weight.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    sizes = blocks.abs().amax(1, keepdim=True)
    return (blocks * (sizes > _SMALL * sizes.max())).view(-1)[: len(flat)].view(weight.shape)


def _signs(weight: Tensor) -> Tensor:
    """0, 1 or 2 of weights below, at and above zero."""
    return (sampled(weight)[::_EVERY].float().sign() + _ZERO).to("cpu", torch.uint8)


def _packed(signs: Iterable[Tensor]) -> bytes:
    """Four to a byte."""
    flat = torch.cat(list(signs))
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 4), value=_ZERO).view(-1, 4)
    return bytes((flat << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)).sum(1).tolist())


def _unpacked(packed: Tensor) -> Tensor:
    return (packed[:, None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)) & 3
