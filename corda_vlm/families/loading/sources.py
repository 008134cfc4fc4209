"""What a user may call a model, as far as that can be told without loading one."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from corda_vlm.errors import CordaError, UnknownNameError, brief
from corda_vlm.files import asset, home_path

FORMS = (
    "A model is: a built-in name; a folder in the format of transformers (config.json) or open_clip "
    "(open_clip_config.json); a GGUF file of a language model; 'ORG/NAME' of a transformers model on the Hugging Face hub; "
    "'MODEL/TAG' of open_clip, e.g. 'ViT-B-32/laion2b_s34b_b79k'; or 'hf-hub:ORG/NAME' of open_clip."
)


def built_in() -> dict[str, Path]:
    """Built-in models: the folders of the model zoo that have a card."""
    return {
        card.parent.name: card.parent for card in sorted(asset("model_zoo").glob("*/card.yaml"))
    }


FAMILY_NAMES = ("clip_hf", "siglip_hf", "image_text_hf", "clip_open", "llava", "llm")
"""Those of this package; a program may register others."""


def check_family(name: str) -> None:
    """Refuse what no family is called.

    Raises:
        UnknownNameError: neither "auto", nor one of this package's, nor one that this program has registered.
    """
    registry: Any = sys.modules.get("corda_vlm.families.registry")  # imported by who registers
    names = ("auto", *(FAMILY_NAMES if registry is None else registry.FAMILIES))
    if name not in names:
        raise UnknownNameError("family", name, names)


def check_source(source: str | Path) -> None:
    """Refuse what cannot be a model's name, folder or file, so that a slip is told before PyTorch is there.

    Whether a hub has a model of that name, and what a folder holds, only loading tells.

    Raises:
        UnknownNameError: no such built-in name.
        CordaError: no such folder.
    """
    text = str(source).removeprefix("local-dir:")
    zoo = built_in()
    try:
        path = home_path(text)
        if text in zoo or path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
            return
    except (OSError, CordaError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CordaError(f"{brief(text)} is no model's name or folder: {reason}") from error
    if text.startswith("hf-hub:") or text.removesuffix("-hf") in zoo:
        return
    if "/" not in text:
        raise UnknownNameError("model", text, [*zoo, *(f"{name}-hf" for name in zoo)], FORMS)
    first = text.partition("/")[0]
    if first in open_clip_models():
        return
    # "ORG/NAME" of a hub has one slash, and no folder of that organization is here
    if text.startswith((".", "~", "/")) or text.count("/") > 1 or Path(first).is_dir():
        raise CordaError(f"no folder {brief(text)}. {FORMS}")


def open_clip_models() -> list[str]:
    """The names of open_clip's models, which are those of its configuration files."""
    found = find_spec("open_clip")
    places = found.submodule_search_locations if found is not None else None
    return [
        file.stem for place in places or () for file in Path(place).glob("model_configs/*.json")
    ]
