"""The verb export: an adapter in a form that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from corda_vlm.errors import CordaError
from corda_vlm.experiment import checks
from corda_vlm.families.options import LoadOptions
from corda_vlm.options import Count
from corda_vlm.verbs.shared import load_source


def export(
    model: str,
    adapter: str,
    output: str,
    format: Literal["lora", "residual", "merged"] = "merged",
    rank: Count | None = None,
    layout: Literal["ours", "peft"] = "ours",
    serve: Literal["vllm", "llama.cpp"] | None = None,
    scores: str | None = None,
    method: str | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    scale: float | None = None,
    *,
    load: LoadOptions,
) -> None:
    """Write a trained adapter so that plain peft, transformers or open_clip loads it, in the dtype that is given.

    Example:
        corda-vlm export emoji-clip adapter digits-clip --format merged

    Args:
        model: The model that the adapter was trained on.
        adapter: Folder of the trained adapter; or a plan, the file that the verb `plan` wrote: then what other tools start
            to train from.
        output: Folder to write.
        format: lora (on the original base), residual (base and adapter), or merged (a plain model).
        rank: With lora: recompress to this rank.
        layout: With residual: ours has the base in base/; peft has it at the root, and the initial pair in corda_init/, from which
            PEFT converts what is trained into a lora on the original base.
        serve: The server that is to read the folder: what it would refuse is refused, and the commands that serve it are printed.
        scores: A file of scores (JSON lines, as evaluate writes it), whose numbers go into the card, README.md. Those of the run
            that the adapter is of, or a scores.jsonl in its folder, need not be named.
        method: With scores of several models: which of them it is.
        learning_rate: With scores of several learning rates: the one that it was trained at.
        seed: With scores of several seeds: the one that it was trained with.
        scale: With scores of several strengths: the one that is meant; 1 is as it was trained.
    """
    checks.check_source(model)
    planned = Path(adapter).is_file()
    if not planned:
        checks.check_folder(adapter, "training's", "make it by corda-vlm train")
    checks.check_output(output, folder=True)
    which = {"method": method, "learning_rate": learning_rate, "seed": seed, "scale": scale}
    if scores is None and (given := [name for name, value in which.items() if value is not None]):
        raise CordaError(f"{given[0]} says which of the scores are meant; give --scores too")
    from corda_vlm.adapter import attach_adapter, export_adapter, load_adapter
    from corda_vlm.adapter.folder import REPORT
    from corda_vlm.evaluation.score_file import read_rows
    from corda_vlm.experiment.scored import scores_of
    from corda_vlm.files import read_json
    from corda_vlm.plan import AdapterPlan
    from corda_vlm.report import write_card
    from corda_vlm.report.card import rows_of_one_model

    rows = None if scores is None else read_rows(scores)
    if scores is None and not planned and (found := scores_of(adapter)) is not None:
        scores, rows, which = str(found.path), found.rows, dict(found.which)
    if rows is not None:
        rows_of_one_model(rows, which)  # before anything is written
    bare = load_source(model, load).model
    if planned:
        trained = attach_adapter(bare, AdapterPlan.load(adapter, model=bare))
    else:
        trained = load_adapter(bare, adapter)
    written = export_adapter(
        trained, output, format=format, rank=rank, source=model, layout=layout, serve=serve
    )
    if rows is not None:
        write_card(written, rows, **which)
        print(f"its card has the scores of {scores}")
    print(f"wrote {written}")
    if serve is not None:
        print(*read_json(written / REPORT, "export")["serve_commands"], sep="\n")
