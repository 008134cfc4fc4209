"""Plain LoRAs under the names of the original LLaVA repository, and back.

    python -m corda_vlm.integrations.llava start start-llava                  # a start of ours, for haotian-liu/LLaVA
    python -m corda_vlm.integrations.llava trained home --naming transformers # what it trained, for transformers

The repository has its own class for the model, whose layers are called otherwise than transformers calls them (see
`corda_vlm.families.llava_names`), and reads PEFT's format. Only names change: no weight does.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from peft.utils.other import get_pattern_key

from corda_vlm.command_line import Command
from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.families.llava_names import rename
from corda_vlm.files import atomic_folder, write_json
from corda_vlm.integrations.command import run_command
from corda_vlm.tensors import CHECKSUMS, load_tensors, read_header, save_tensors

Naming = Literal["llava", "transformers", "transformers4"]

_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(?P<site>.+)\.(?P<rest>lora_[AB]\.weight)")


def rename_adapter(adapter: str | Path, output: str | Path, naming: Naming = "llava") -> None:
    """Write the plain LoRA of a folder under the layers' names of another repository, into a new folder.

    Raises:
        ForeignFileError: no plain LoRA there.
        CordaError: the folder to write is there already.
    """
    folder, final = Path(adapter), Path(output)
    config = _config(folder)
    if final.exists():
        raise CordaError(f"{final} is there already; name a new folder")
    told = folder / "adapter_model.safetensors", "adapter weights", "export again"
    tensors, (_, header) = load_tensors(*told), read_header(*told)
    parts: dict[str, tuple[str, str]] = {}
    for key in tensors:
        if (found := _KEY.fullmatch(key)) is None:
            raise ForeignFileError(
                f"{folder} holds {key!r}, which is of no plain LoRA: export with format lora, and without modules_to_save"
            )
        parts[key] = found["site"], found["rest"]
    names = rename(dict.fromkeys(site for site, _ in parts.values()), naming)
    with atomic_folder(final) as partial:
        partial.mkdir(exist_ok=True)
        save_tensors(
            partial / "adapter_model.safetensors",
            {f"{_PREFIX}{names[site]}.{rest}": tensors[key] for key, (site, rest) in parts.items()},
            {entry: text for entry, text in header.items() if entry != CHECKSUMS},
        )
        write_json(partial / "adapter_config.json", {**config, **_renamed(config, names, naming)})


def _renamed(config: dict[str, Any], names: dict[str, str], naming: Naming) -> dict[str, Any]:
    """The fields of a `LoraConfig` that name layers, with the new names."""
    fields: dict[str, Any] = {"target_modules": sorted(names.values())}
    for field in ("rank_pattern", "alpha_pattern"):
        if patterns := config.get(
            field
        ):  # regular expressions, of which PEFT takes the first that fits
            own = {site: get_pattern_key(patterns, site) for site in names}
            fields[field] = {
                f"^{re.escape(names[site])}": patterns[key]
                for site, key in own.items()
                if key in patterns
            }
    if saved := config.get("modules_to_save"):
        new = rename(saved, naming)
        fields["modules_to_save"] = [new[name] for name in saved]
    return fields


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ForeignFileError(f"{folder} holds no adapter that can be read: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ForeignFileError(
            f"{folder} holds an adapter of type {kind!r}, and names are changed of plain LoRAs: export it with format lora first"
        )
    return config


def _command(adapter: str, output: str, naming: Naming = "llava") -> None:
    """Write a plain LoRA of a LLaVA under the layers' names of another repository.

    Args:
        adapter: Folder of a plain LoRA: an export with format lora, or what a tool trained from it.
        output: Folder to write.
        naming: llava, the original repository; transformers, version 5; or transformers4.
    """
    rename_adapter(adapter, output, naming)


def main(words: Sequence[str] | None = None) -> None:
    """What the module's own command line does."""
    given = sys.argv[1:] if words is None else words
    _command(**Command("llava", _command).read(list(given)))


if __name__ == "__main__":
    run_command("corda_vlm.integrations.llava", main)
