"""What a layer or weight of LLaVA is called: in transformers 5, in transformers 4, in the original repository.

| transformers 5 (its models)                | transformers 4 (files on the hub)             | haotian-liu/LLaVA                                        |
|--------------------------------------------|-----------------------------------------------|----------------------------------------------------------|
| `model.language_model.layers.0…`           | `language_model.model.layers.0…`              | `model.layers.0…`                                        |
| `lm_head`                                  | `language_model.lm_head`                      | `lm_head`                                                |
| `model.vision_tower.encoder.layers.0…`     | `vision_tower.vision_model.encoder.layers.0…` | `model.vision_tower.vision_tower.vision_model.encoder…`  |
| `model.multi_modal_projector.linear_1`     | `multi_modal_projector.linear_1`              | `model.mm_projector.0`                                   |
| `model.image_newline`                      | `image_newline`                               | `model.image_newline`                                    |

Models of transformers 4.52 and later are in between (`model.vision_tower.vision_model.encoder…`); those names are
read, too. A name that is none of LLaVA's stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from corda_vlm.errors import CordaError, UnknownNameError

_End = r"(?=\.|$)"
_Table = Sequence[tuple[str, str]]

_FROM_ANY: _Table = (
    (r"model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (rf"model\.mm_projector\.0{_End}", "model.multi_modal_projector.linear_1"),
    (rf"model\.mm_projector\.2{_End}", "model.multi_modal_projector.linear_2"),
    (r"multi_modal_projector\.", "model.multi_modal_projector."),
    (r"language_model\.model\.", "model.language_model."),
    (rf"language_model\.lm_head{_End}", "lm_head"),
    (rf"model\.(layers|embed_tokens|norm){_End}", r"model.language_model.\1"),
    (rf"image_newline{_End}", "model.image_newline"),
)
_TO: dict[str, _Table] = {
    "transformers": (),
    "transformers4": (
        (r"model\.language_model\.", "language_model.model."),
        (rf"lm_head{_End}", "language_model.lm_head"),
        (r"model\.vision_tower\.", "vision_tower.vision_model."),
        (r"model\.(multi_modal_projector|image_newline)", r"\1"),
    ),
    "llava": (
        (r"model\.language_model\.", "model."),
        (r"model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
        (rf"model\.multi_modal_projector\.linear_1{_End}", "model.mm_projector.0"),
        (rf"model\.multi_modal_projector\.linear_2{_End}", "model.mm_projector.2"),
    ),
}


def to_transformers(name: str) -> str:
    """A layer's or weight's name in transformers 5, from any of the three."""
    return _first(name, _FROM_ANY)


def rename(names: Iterable[str], to: str) -> dict[str, str]:
    """Each name, of any of the three, with its name in "transformers" (5), "transformers4" or "llava".

    Raises:
        UnknownNameError: no such naming.
        CordaError: two names become one: the list mixes namings.
    """
    if to not in _TO:
        raise UnknownNameError("naming", to, _TO)
    found = {name: _first(to_transformers(name), _TO[to]) for name in names}
    taken: dict[str, str] = {}
    for name, new in found.items():
        if taken.setdefault(new, name) != name:
            raise CordaError(f"{taken[new]!r} and {name!r} would both be called {new!r}")
    return found


def _first(name: str, table: _Table) -> str:
    for pattern, new in table:
        if re.match(pattern, name):
            return re.sub(pattern, new, name, count=1)
    return name
