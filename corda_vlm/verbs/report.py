"""The verb report: the pages of a run."""

from __future__ import annotations

from pathlib import Path

from corda_vlm.experiment import checks


def report(folder: str) -> None:
    """Write the report of a run or a study again, from its scores, and print the table; also while it is going on.

    Example:
        corda-vlm report runs/demo

    Args:
        folder: Of the run, e.g. runs/demo.
    """
    from corda_vlm.run_files import SCORES, STUDY

    checks.check_folder(folder, "run's", "give that of a run or a study, e.g. runs/demo")
    if not (Path(folder) / STUDY).is_file():
        checks.check_file(Path(folder) / SCORES, "scores", "give the folder of a run or a study")
    from corda_vlm.report import summary_table, write_overview, write_report

    # Without the lock of the run, for an early look: each page and picture is written whole or not at all.
    if (Path(folder) / STUDY).is_file():
        for scores in sorted(Path(folder).glob(f"*/{SCORES}")):
            print(f"wrote {write_report(scores.parent)}")
        print(f"wrote {write_overview(folder)}")
        return
    page = write_report(folder)
    print(f"{summary_table(folder)}\n\nwrote {page}")
