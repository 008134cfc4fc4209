"""The verb import: what another tool trained from an export, as an adapter of this package again."""

from __future__ import annotations

from corda_vlm.experiment import checks
from corda_vlm.families.options import LoadOptions
from corda_vlm.verbs.shared import load_source, say_next


def import_(
    model: str,
    trained: str,
    output: str,
    start: str | None = None,
    *,
    load: LoadOptions,
) -> None:
    """Bring home what another tool trained from an export: evaluate, its scales, the anchor and export --rank then work on it.

    Example:
        corda-vlm import emoji-clip their-checkpoint adapter --start residual

    Args:
        model: The original model, that the export was made from.
        trained: Folder of the plain LoRA that the tool has written.
        output: Folder to write the adapter to.
        start: Folder of the export that the tool began with; looked for by the base model that its LoRA names.
    """
    checks.check_source(model)
    checks.check_folder(trained, "tool's", "give the folder with its adapter_model.safetensors")
    if start is not None:
        checks.check_folder(start, "export's", "make it by corda-vlm export")
    checks.check_output(output, folder=True)
    from pathlib import Path

    from corda_vlm.adapter import import_adapter
    from corda_vlm.adapter.base import base_fingerprint
    from corda_vlm.adapter.folder import REPORT, new_folder
    from corda_vlm.files import write_json
    from corda_vlm.train.weights import save_weights

    adapted = import_adapter(load_source(model, load).model, trained=trained, start=start)
    with new_folder(Path(output)) as folder:
        save_weights(adapted, None, folder, base=base_fingerprint(adapted))
        write_json(folder / REPORT, {"format": "adapter", "trained": str(Path(trained).resolve())})
    say_next(f"wrote {output}", "evaluate", model, "SUITE", "--adapter", output)
