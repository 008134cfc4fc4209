"""A report without matplotlib: what needs no picture works, and the rest names the extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT_MATPLOTLIB = """
import sys
from pathlib import Path

sys.modules["matplotlib"] = None  # as if it were not installed
from corda_vlm.errors import CordaError
from corda_vlm.report import summary_table, write_report

folder = Path(sys.argv[1])
print(summary_table(folder))
try:
    write_report(folder)
except CordaError as error:
    print("refused:", error)
print(sorted(path.name for path in folder.iterdir()))
"""


def test_a_summary_needs_no_matplotlib_and_a_report_names_the_extra(tmp_path: Path) -> None:
    row = (
        '{"run": "r", "task": "digits", "metric": "accuracy", "value": 0.8, "method": "base", '
        '"role": "retention"}\n'
    )
    (tmp_path / "scores.jsonl").write_text(row)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MATPLOTLIB, str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    summary, _, rest = done.stdout.partition("refused:")
    assert "digits" in summary
    assert "80.0%" in summary
    assert "corda-vlm[report]" in rest
    assert rest.endswith("['scores.jsonl']\n")
