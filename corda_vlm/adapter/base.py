"""Which model trained weights belong on: noted beside what is written, and asked for before it is loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from corda_vlm.adapter.paired import PairedConfig
from corda_vlm.errors import ForeignFileError
from corda_vlm.files import read_json, shown, write_json
from corda_vlm.sites import model_fingerprint
from corda_vlm.tensors import read_header

logger = logging.getLogger(__name__)

BASE_NOTE = "base.json"
"""The note beside weights; in the folder of a model that an export made, the fingerprint of that model."""

HEADER = "corda_vlm.base"
"""The same in the header of the weights, for those who copy the files without the note."""


def base_fingerprint(model: nn.Module) -> str:
    """`model_fingerprint` of what the model was before an adapter of ours, which may have put a residual in its place."""
    if isinstance(model, PeftModel):
        config = model.peft_config[str(model.active_adapter)]
        if isinstance(config, PairedConfig):
            noted = config.origin.get("model_fingerprint")
            if isinstance(noted, str):
                return noted
    return model_fingerprint(model)


def origin_of(model: PeftModel, adapter_name: str) -> dict[str, Any]:
    """What an export notes of the model that it began with: its fingerprint, and the plan that the adapter came from."""
    config = model.peft_config[adapter_name]
    noted: Any = getattr(config, "origin", None)
    return {**(noted or {}), "model_fingerprint": base_fingerprint(model)}


def save_base(fingerprint: str, directory: Path) -> None:
    """Note beside weights which model they were trained from."""
    write_json(directory / BASE_NOTE, {"model_fingerprint": fingerprint})


def check_base(
    model: nn.Module, directory: Path, weights: Path, config: dict[str, Any] | None = None
) -> None:
    """Raise unless the weights belong on this model, as far as that is noted anywhere.

    Other tools write adapters without a note. Their configuration names the folder of the base model, and if that was
    made by an export of ours, it has one. A relative name is also looked for around the adapter.

    Args:
        directory: where the weights lie.
        weights: the file of the weights.
        config: of the adapter.

    Raises:
        ForeignFileError: they were made for another model, or the note is damaged.
    """
    _, header = read_header(weights, "trained weights", "train or export them again")
    if HEADER in header:
        check_fingerprint(header[HEADER], model, directory)
    if (directory / BASE_NOTE).is_file():
        check_fingerprint(noted_fingerprint(directory), model, directory)
    elif HEADER not in header and config is not None:
        name = config.get("base_model_name_or_path") or ""
        places = places_of(name, directory)
        base = next((place for place in places if _is_there(place / BASE_NOTE)), None)
        if base is not None:
            check_fingerprint(noted_fingerprint(base), model, directory, base)
        elif _names_a_folder(name) and not any(map(_is_there, places)):
            logger.warning(
                "%s was trained on the model in %s, which is not there: whether it belongs on this model cannot be checked",
                shown(directory),
                shown(name),
            )


def absolute(name: str | Path | None) -> str | None:
    """A local folder by a name that holds from elsewhere too; an id on a hub stays as it is."""
    if not name:
        return None
    return str(Path(name).resolve() if Path(name).is_dir() else name)


def places_of(name: str, directory: Path) -> list[Path]:
    """Where the base model may lie that an adapter names: a relative path is one from where the training ran."""
    if not name:
        return []
    around = directory.absolute()
    return [Path(name), *(folder / name for folder in (around, *around.parents[:3]))]


def _names_a_folder(name: str) -> bool:
    """Is it the name of a local folder rather than an id on a hub? Of our exports' bases it is."""
    parts = Path(name).parts
    return (
        Path(name).is_absolute()
        or name.startswith((".", "~"))
        or len(parts) > 2
        or parts[-1:] == ("base",)
    )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, or a NUL
        return False


def noted_fingerprint(folder: Path) -> object:
    """Which model the note in a folder says."""
    noted = read_json(folder / BASE_NOTE, "note of the base model")
    return noted.get("model_fingerprint") if isinstance(noted, dict) else None


def check_fingerprint(
    made_for: object,
    model: nn.Module,
    directory: Path,
    base: Path | None = None,
    *,
    of_export: bool = False,
) -> None:
    """Raise `ForeignFileError` unless `made_for` is the fingerprint of the model before any adapter.

    Args:
        directory: where what was made for it lies.
        base: the folder of the right model, where that is known.
        of_export: it was made from the original model, whatever lies beside it.
    """
    if made_for == (fingerprint := base_fingerprint(model)):
        return
    beside = directory / "base" if (directory / "base").is_dir() and not of_export else base
    remedy = (
        f"Load the model that it was trained on, {shown(beside)}."
        if beside is not None
        else "Load the original model it was made from."
    )
    raise ForeignFileError(
        f"what lies in {shown(directory)} was made for the model {shown(str(made_for))}, and this one is {fingerprint}: "
        f"other layers or other weights. {remedy}"
    )
