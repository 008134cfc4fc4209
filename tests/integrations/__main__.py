"""Install each tool, run its recipes from beginning to end, and print a table of what was checked.

    python -m tests.integrations                  # every tool
    python -m tests.integrations trl swift        # some of them

A tool has an environment of its own in `.venvs/`, which is kept; the test's own PyTorch is seen there. The table is also
written to runs/integrations, as Markdown and as JSON. The status is 1 where a tool was not installed or a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.tools import FOLDER, ROOT, TOOLS, Tool

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        tool: its name.
        versions: of the packages that matter, as "name version".
        check: what was looked at.
        outcome: "passed", or why not.
        measured: what the check found, in a few words.
    """

    tool: str
    versions: str
    check: str
    outcome: str
    measured: str = ""


class Rows:
    """A plugin of pytest that notes a row for each test."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._versions: dict[str, str] = {}

    def versions(self, tool: Tool) -> str:
        if tool.name not in self._versions:
            told = tool.versions().items()
            self._versions[tool.name] = ", ".join(f"{name} {version}" for name, version in told)
        return self._versions[tool.name]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        report = yield
        told = item.function.__doc__ and report.when == "call"
        if told or report.outcome != "passed":
            tool = TOOLS[item.path.stem.removeprefix("test_")]
            check = (item.function.__doc__ or item.name).strip().splitlines()[0].rstrip(".")
            measured = dict(item.user_properties).get("measured", "")
            if report.when == "teardown" or report.outcome == "skipped":
                measured = ""
            outcome = "passed" if report.outcome == "passed" else _reason(call)
            self.rows.append(Row(tool.name, self.versions(tool), check, outcome, measured))
        return report


def _reason(call: Any) -> str:
    """The last line of what an exception says: that of a tool is its own."""
    lines = [line for line in str(call.excinfo.value).splitlines() if line.strip()]
    return f"{call.excinfo.typename}: {lines[-1].strip()[:300] if lines else ''}"


def prepared(tools: Sequence[Tool]) -> tuple[list[Tool], list[Row]]:
    """The tools that are there, and a row for each that could not be installed."""
    ready, rows = [], []
    for tool in tools:
        print(f"{tool.name}: installing", file=sys.stderr, flush=True)
        try:
            tool.prepare()
            ready.append(tool)
        except (subprocess.CalledProcessError, OSError) as error:
            said = (getattr(error, "stdout", None) or str(error)).strip().splitlines()
            print(*said[-20:], sep="\n", file=sys.stderr)
            rows.append(
                Row(tool.name, "", "is installed by pip", f"not installed: {said[-1][:300]}")
            )
    return ready, rows


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown."""
    lines = ["| tool | version | what was checked | outcome | measured |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row.tool, row.versions, row.check, row.outcome, row.measured)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Run the checks and print the table; 1 where one failed, or a tool is not there."""
    parser = argparse.ArgumentParser("python -m tests.integrations", description=__doc__)
    parser.add_argument("tools", nargs="*", help=f"some of {', '.join(TOOLS)}; none for all")
    parser.add_argument("--folder", type=Path, help="where the environments are")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "integrations")
    parser.add_argument("-k", default="", help="pytest's: only checks whose names fit")
    options = parser.parse_args(words)
    if unknown := set(options.tools) - set(TOOLS):
        parser.error(f"no tool {sorted(unknown)[0]!r}; there are {', '.join(TOOLS)}")
    if options.folder is not None:
        os.environ[FOLDER] = str(options.folder.resolve())
    asked = [tool for tool in TOOLS.values() if not options.tools or tool.name in options.tools]
    ready, rows = prepared(asked)
    noted = Rows()
    files = [str(HERE / f"test_{tool.name}.py") for tool in ready]
    status = 0
    if files:  # corda_vlm is imported by pytest alone, which checks its annotations
        chosen = ["-k", options.k] if options.k else []
        status = pytest.main(
            ["-p", "no:cacheprovider", "-m", "", "--tb=short", *chosen, *files], plugins=[noted]
        )
    rows += noted.rows
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(table(rows), encoding="utf-8")
    as_json = json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False)
    (options.out / "table.json").write_text(as_json + "\n", encoding="utf-8")
    print(table(rows))
    failed = [row for row in rows if row.outcome != "passed"]
    return int(bool(failed) or not rows or status != 0)


if __name__ == "__main__":
    sys.exit(main())
