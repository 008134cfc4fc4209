"""The README.md of a folder that an export wrote: what it is, how plain tools load it, and what was measured.

Its head is the YAML that the hub reads (`ModelCardData` of huggingface_hub).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from corda_vlm.files import write_text

_KINDS = {
    "lora": "A plain LoRA on the original model.",
    "residual": "A LoRA to go on training from, and the model that it belongs on: the original one less what the LoRA starts with.",
    "merged": "A whole model, with what was trained merged into its weights.",
}


def write_export_card(
    folder: str | Path,
    report: Mapping[str, Any],
    *,
    sections: str = "",
    head: Mapping[str, Any] | None = None,
) -> None:
    """Write the README.md of an export.

    Args:
        report: what `corda_export.json` has.
        sections: Markdown to add, e.g. what was measured.
        head: further entries of the head, as `ModelCardData` takes them.
    """
    data = ModelCardData(
        base_model=report.get("base_model"),
        library_name="peft" if report["format"] != "merged" else None,
        pipeline_tag=report.get("pipeline_tag"),
        tags=["corda", "corda_vlm", *(["lora"] if report["format"] != "merged" else [])],
        **(head or {}),
    )
    text = f"---\n{data.to_yaml()}\n---\n\n# {Path(report['name']).name}\n\n{_KINDS[report['format']]}\n\n{_origin(report)}{_loading(report)}"
    write_text(Path(folder) / "README.md", text + (f"\n{sections}" if sections else ""))


def _origin(report: Mapping[str, Any]) -> str:
    """The plan that it came from, in words."""
    original = report.get("original") or {}
    method = original.get("method")
    if not method:
        return ""
    mode = f" in mode {original['mode']}" if original.get("mode") else ""
    return (
        f"Made by [corda_vlm](https://arxiv.org/abs/2406.05223) with the method `{method}`{mode}, "
        f"rank {original.get('rank')}.\n\n"
    )


def _loading(report: Mapping[str, Any]) -> str:
    lines = ["## How to load it", "", f"`{report['load']}`, HERE being this folder."]
    if convert := report.get("as_lora_on_the_original"):
        lines += ["", "What PEFT trains from there becomes a LoRA on the original model by", "", f"`{convert}`"]  # fmt: skip
    if commands := report.get("serve_commands"):
        lines += ["", f"It is served with {report['serve']} by", "", "```sh", *commands, "```"]
    if report["format"] == "residual":
        lines += [
            "",
            "The adapter belongs on this base alone: on the original model it would count what it starts with twice. "
            "`corda-vlm import MODEL TRAINED NEW_FOLDER` brings what was trained back to corda_vlm.",
        ]
    return "\n".join(lines) + "\n"
