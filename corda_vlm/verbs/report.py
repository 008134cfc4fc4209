"""The verb report: the pages of a run, or of a comparison of anybody's results before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from corda_vlm.errors import CordaError
from corda_vlm.experiment import checks
from corda_vlm.extras import check_installed
from corda_vlm.options import BY_PLACE
from corda_vlm.report.before_after.options import BeforeAfterOptions


def report(
    folder: Annotated[str | None, BY_PLACE] = None,
    predictions: list[str] | None = None,
    *,
    comparison: BeforeAfterOptions,
) -> None:
    """Write the report of a run or a study again, from its scores; or compare anybody's results before and after training.

    A run's report can be written while it is going on. A comparison reads what lm-eval, lmms-eval, CLIP_benchmark, VLMEvalKit
    or corda-vlm wrote, pairs samples where they are told, and says what was gained and what share of the knowledge was kept.

    Example:
        corda-vlm report --before results/base --after results/tuned --gain gsm8k

    Args:
        folder: Of the run, e.g. runs/demo; none with --before and --after.
        predictions: Files of corda-vlm evaluate --predictions, of the base model and of trained ones: the examples that were
            gained and lost are shown. The run's own predictions.jsonl counts without being named.
    """
    if comparison.is_given:
        if folder is not None:
            raise CordaError(
                f"{folder} is one word too many: a comparison has --before and --after alone"
            )
        _compare(comparison)
        return
    if folder is None:
        raise CordaError(
            "corda-vlm report needs FOLDER, that of a run or a study, e.g. runs/demo, or --before and --after with results of any tool"
        )
    _of_run(folder, predictions or ())


def _compare(comparison: BeforeAfterOptions) -> None:
    check_installed("matplotlib", "report", "The report of a comparison")
    from corda_vlm.report.before_after.write import write_comparison

    page, summary = write_comparison(comparison)
    print(f"{summary}\n\nwrote {page}")


def _of_run(folder: str, predictions: Sequence[str]) -> None:
    from corda_vlm.run_files import SCORES, STUDY

    checks.check_folder(folder, "run's", "give that of a run or a study, e.g. runs/demo")
    if not (Path(folder) / STUDY).is_file():
        checks.check_file(Path(folder) / SCORES, "scores", "give the folder of a run or a study")
    for file in predictions:
        checks.check_file(file, "predictions", "make it by corda-vlm evaluate … --predictions")
    from corda_vlm.report import summary_table, write_overview, write_report

    # Without the lock of the run, for an early look: each page and picture is written whole or not at all.
    if (Path(folder) / STUDY).is_file():
        for scores in sorted(Path(folder).glob(f"*/{SCORES}")):
            print(f"wrote {write_report(scores.parent)}")
        print(f"wrote {write_overview(folder)}")
        return
    page = write_report(folder, predictions=predictions)
    print(f"{summary_table(folder)}\n\nwrote {page}")
