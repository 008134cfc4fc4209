"""The report of a comparison, written: Markdown, one HTML page, a picture and a card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corda_vlm.errors import CordaError
from corda_vlm.files import home_path, shown, write_json, write_text
from corda_vlm.names import listed
from corda_vlm.report.before_after.card import card
from corda_vlm.report.before_after.comparison import Comparison, compare_models
from corda_vlm.report.before_after.options import BeforeAfterOptions
from corda_vlm.report.before_after.sources import read_after, read_before
from corda_vlm.report.before_after.tables import (
    changes_table,
    leading,
    remarks,
    summary_table,
    ways,
)
from corda_vlm.report.document import Picture, Report, Section, markdown, page
from corda_vlm.report.formats.base import Measured
from corda_vlm.report.markup import terminal
from corda_vlm.run_files import CARD, CHANGE, MARKER, PAGE, REPORT, SCORES
from corda_vlm.text_table import text_table


def write_comparison(options: BeforeAfterOptions) -> tuple[Path, str]:
    """Read the results, compare them, and write report.md, report.html, change.png and card.json.

    Returns:
        the path of report.html, and the table and the sentences that a person wants to see in a terminal.

    Raises:
        ForeignFileError: results that cannot be read.
        CordaError: results that cannot be compared, or matplotlib is not installed.
    """
    options = options.with_file()
    if not options.before or not options.after:
        missing = "--before" if options.after else "--after"
        raise CordaError(
            f"a comparison needs results before and after training; {missing} is missing: corda-vlm report --before A --after B"
        )
    folder = home_path(options.output)
    _check_folder(folder)
    before, after = read_before(options.before), read_after(options.after)
    comparisons = compare_models(before, after, options)
    from corda_vlm.report.plots.before_after import change_picture  # needs matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    drawn = change_picture(comparisons, folder / CHANGE)
    report = _report(options.title, before, after, comparisons, folder / CHANGE if drawn else None)
    write_text(folder / REPORT, markdown(report, folder))
    write_text(folder / PAGE, page(report))
    write_json(folder / CARD, card(before, after, comparisons))
    return folder / PAGE, _for_a_terminal(before, comparisons)


def _check_folder(folder: Path) -> None:
    """A run's folder has a report of its own under these names."""
    if (folder / MARKER).exists() or (folder / SCORES).exists():
        raise CordaError(
            f"{shown(folder)} is the folder of a run, whose report this would replace; give another with --output"
        )


def _report(
    title: str,
    before: Measured,
    after: Sequence[Measured],
    comparisons: Sequence[Comparison],
    picture: Path | None,
) -> Report:
    lead = leading(comparisons, before.name)
    drawn = []
    if picture is not None:
        drawn.append(
            Picture(
                picture,
                " ".join(terminal(sentence) for sentence in lead),
                "Left, what was kept of each task that was known before: 100% is the model before training, 0% is guessing. Right, the "
                "change of the score on what was to be learned. Lines are 95% intervals over samples.",
            )
        )
    sections = [
        Section(
            "What was learned and what was kept",
            remarks(comparisons),
            drawn,
            [summary_table(comparisons)],
        )
    ]
    tables = [changes_table(one, len(comparisons) == 1) for one in comparisons]
    sections.append(Section("Every task", ways(comparisons), tables=tables))
    sections.append(Section("Where the numbers are from", [_sources(before, after)]))
    return Report(title, lead, sections)


def _sources(before: Measured, after: Sequence[Measured]) -> str:
    told = [f"{model.name}: {listed(model.tools)}" for model in (before, *after)]
    return f"Read from the results of {'; '.join(told)}."


def _for_a_terminal(before: Measured, comparisons: Sequence[Comparison]) -> str:
    table = summary_table(comparisons)
    words = leading(comparisons, before.name) + remarks(comparisons)
    lines = text_table(
        [[terminal(cell) for cell in row] for row in table.rows],
        [terminal(cell) for cell in table.headings],
        [place > 0 for place in range(len(table.headings))],
    )
    return "\n\n".join([lines, *map(terminal, words)])
