"""The families by name, and which one a model belongs to."""

from __future__ import annotations

import re

from torch import nn

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families.base import Family, unwrap
from corda_vlm.families.clip_hf import CLIP_HF, SIGLIP_HF
from corda_vlm.families.clip_open import CLIP_OPEN
from corda_vlm.families.generic import GENERIC
from corda_vlm.families.image_text import IMAGE_TEXT_HF
from corda_vlm.families.layers.matrix import matrix_of
from corda_vlm.families.llava import LLAVA
from corda_vlm.families.llm import LLM
from corda_vlm.families.lookalike import LOOKALIKE
from corda_vlm.registries import register

FAMILIES: dict[str, Family] = {
    family.name: family for family in (CLIP_HF, SIGLIP_HF, IMAGE_TEXT_HF, CLIP_OPEN, LLAVA, LLM)
}


def register_family(family: Family) -> Family:
    """Make `family` known to `detect_family`, `find_sites` and `load_model`. Returns it.

    Raises:
        CordaError: another family has that name.
    """
    return register(FAMILIES, "family", family.name, family)


def detect_family(model: nn.Module) -> Family:
    """The family of a model, which may be wrapped by PEFT.

    Raises:
        CordaError: no family knows the class, or the family cannot adapt this model; says why.
    """
    bare = unwrap(model)
    if (family := known_family(bare)) is not None:
        return family
    known = "; ".join(f"{name} ({', '.join(family.classes)})" for name, family in FAMILIES.items())
    raise CordaError(
        f"no family knows the model class {type(bare).__module__}.{type(bare).__name__}: say which of its nn.Linear or nn.Conv2d layers to "
        f"adapt, as targets=[{_example(bare)!r}] (--targets), or register_family(Family(...)) as docs/pages/extend.md shows.\n"
        f"Families: {known}."
    )


def any_family(model: nn.Module) -> Family:
    """The family of a model as of `detect_family`, or where none knows it `GENERIC`, of which `targets` say the layers."""
    return known_family(unwrap(model)) or GENERIC


def known_family(bare: nn.Module) -> Family | None:
    """The family that knows a bare model.

    Raises:
        CordaError: the family cannot adapt this model; says why.
    """
    for family in (*FAMILIES.values(), LOOKALIKE):  # which all others go before, those of users too
        if family.matches(bare):
            if reason := family.refuses(bare):
                raise CordaError(f"{type(bare).__name__} cannot be adapted: {reason}")
            return family
    return None


def _example(bare: nn.Module) -> str:
    """A pattern of layers that the model has."""
    names = [
        name for name, module in bare.named_modules() if name and matrix_of(module) is not None
    ]
    in_blocks = [name for name in names if re.search(r"\.\d+\.", name)]
    return re.sub(r"\.\d+\.", ".*.", next(iter(in_blocks or names), "layers.*.linear"))


def family_of(family: str | Family, model: nn.Module) -> Family:
    """The family as given, by name, or detected from the model for `"auto"`.

    Raises:
        UnknownNameError: no family of that name.
    """
    return chosen(family) or detect_family(model)


def chosen(family: str | Family) -> Family | None:
    """The family asked for, None for "auto"."""
    if isinstance(family, Family) or family == "auto":
        return None if isinstance(family, str) else family
    if family not in FAMILIES:
        raise UnknownNameError("family", family, ["auto", *FAMILIES])
    return FAMILIES[family]
