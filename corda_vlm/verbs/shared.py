"""What several verbs share: reading what they were given, and saying what there is now."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_vlm.families.options import LoadOptions
from corda_vlm.options import as_keywords

if TYPE_CHECKING:
    from corda_vlm.families import Loaded

Data = str | dict[str, Any]


def listed_or_file(items: list[str] | None) -> list[str] | str | None:
    """Class names or templates: one item alone names a file of them, but for a template, which has braces."""
    return items[0] if items and len(items) == 1 and "{" not in items[0] else items


def load_source(model: str, load: LoadOptions) -> Loaded:
    from corda_vlm.families import load_model

    return load_model(model, **as_keywords(load, LoadOptions))


def modified(path: str) -> int | None:
    from corda_vlm.files import check_path

    return Path(path).stat().st_mtime_ns if check_path(path).exists() else None


def say_next(done: str, *words: str) -> None:
    """What there is now, and the command that goes on from it."""
    print(f"\n{done}. Next: corda-vlm {shlex.join(words)}")


def name_of(adapter: Path) -> str:
    """What scores call an adapter: its folder, and of a training's own `weights/` the training's folder."""
    adapter = adapter.resolve()
    return adapter.parent.name if adapter.name == "weights" else adapter.name
