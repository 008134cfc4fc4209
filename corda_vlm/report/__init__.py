"""Looking at what was measured: comparisons, tables, pictures and pages. Begins at scores.jsonl.

Of the package, matplotlib is imported here alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corda_vlm.lazy import names_of

if TYPE_CHECKING:
    from corda_vlm.report.analysis.choose import choose
    from corda_vlm.report.analysis.compare import against, compare, dominates
    from corda_vlm.report.analysis.convergence import steps_to_loss
    from corda_vlm.report.analysis.findings import leading_finding
    from corda_vlm.report.analysis.results import Results
    from corda_vlm.report.before_after.options import BeforeAfterOptions, Roles
    from corda_vlm.report.before_after.write import write_comparison
    from corda_vlm.report.card import write_card
    from corda_vlm.report.formats.registry import FORMATS, read_results, register_format
    from corda_vlm.report.overview import write_overview
    from corda_vlm.report.write import summary_table, write_report

_HOMES = {
    "BeforeAfterOptions": "before_after.options",
    "FORMATS": "formats.registry",
    "Results": "analysis.results",
    "Roles": "before_after.options",
    "against": "analysis.compare",
    "choose": "analysis.choose",
    "compare": "analysis.compare",
    "dominates": "analysis.compare",
    "leading_finding": "analysis.findings",
    "read_results": "formats.registry",
    "register_format": "formats.registry",
    "steps_to_loss": "analysis.convergence",
    "summary_table": "write",
    "write_card": "card",
    "write_comparison": "before_after.write",
    "write_overview": "overview",
    "write_report": "write",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = names_of(__name__, _HOMES)
