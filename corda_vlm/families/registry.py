"""The families by name, and which one a model belongs to."""

from __future__ import annotations

from torch import nn

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.families.base import Family, unwrap
from corda_vlm.families.clip_hf import CLIP_HF, SIGLIP_HF
from corda_vlm.families.clip_open import CLIP_OPEN
from corda_vlm.families.llava import LLAVA
from corda_vlm.families.llm import LLM
from corda_vlm.registries import register

FAMILIES: dict[str, Family] = {
    family.name: family for family in (CLIP_HF, SIGLIP_HF, CLIP_OPEN, LLAVA, LLM)
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
    for family in FAMILIES.values():
        if family.matches(bare):
            if reason := family.refuses(bare):
                raise CordaError(f"{type(bare).__name__} cannot be adapted: {reason}")
            return family
    known = "; ".join(f"{name} ({', '.join(family.classes)})" for name, family in FAMILIES.items())
    raise CordaError(
        f"no family knows the model class {type(bare).__module__}.{type(bare).__name__}. Families: {known}. "
        "To add one, declare a corda_vlm.families.Family (its rules say which layers are adapted and which of "
        "them read one input) and pass it to corda_vlm.families.register_family; for a language model "
        "corda_vlm.families.llm says how in three lines."
    )


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
