"""The model families, and one way to load a model of any of them.

A family is one `Family` in one file of this package. To add one, declare its rules there (or in a file of
your own) and pass it to `register_family`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.families.base import (
        Batch,
        Contrastive,
        Family,
        Generative,
        Loaded,
        Masking,
        Processor,
        Rule,
        block_rules,
        token_masks,
        unwrap,
    )
    from corda_vlm.families.generative.language import LanguageProcessor
    from corda_vlm.families.load import load_model
    from corda_vlm.families.options import TOKENS
    from corda_vlm.families.registry import (
        FAMILIES,
        any_family,
        detect_family,
        family_of,
        register_family,
    )

_HOMES = {
    "FAMILIES": "registry",
    "TOKENS": "options",
    "Batch": "base",
    "Contrastive": "base",
    "Family": "base",
    "Generative": "base",
    "LanguageProcessor": "generative.language",
    "Loaded": "base",
    "Masking": "base",
    "Processor": "base",
    "Rule": "base",
    "any_family": "registry",
    "block_rules": "base",
    "detect_family": "registry",
    "family_of": "registry",
    "load_model": "load",
    "register_family": "registry",
    "token_masks": "base",
    "unwrap": "base",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
