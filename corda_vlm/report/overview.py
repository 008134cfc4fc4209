"""The overview of a study: what each of its experiments found, and where its report is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.files import read_json, write_text
from corda_vlm.options import fitted
from corda_vlm.report.analysis.findings import leading_finding
from corda_vlm.report.analysis.results import Results
from corda_vlm.report.markup import link, markdown
from corda_vlm.run_files import REPORT, SCORES, STUDY, TRADEOFF

PICTURES = {TRADEOFF: "task accuracy against knowledge kept"}
"""Of each experiment's pictures those that the overview shows, with what they show."""


def write_overview(folder: str | Path) -> Path:
    """Write report.md of a study: what each experiment found so far, and where its report is.

    Raises:
        ForeignFileError: not the folder of a study.
    """
    folder = Path(folder)
    title, experiments = _listed(folder / STUDY)
    lines = [f"# {markdown(title)}", ""]
    for name, own in experiments.items():
        lines += [f"## {markdown(own)}", ""]
        if not (folder / name / SCORES).is_file():
            lines += ["Not run yet.", ""]
            continue
        results = Results.read(folder / name)
        trained = [seeds for of in results.trained.values() for seeds in of.values()]
        count = f"{sum(map(len, trained)):,} models measured"
        count += f", {len(results.diverged):,} diverged" if results.diverged else ""
        lines += [leading_finding(results), ""]
        lines += [f"{count}. [Report]({link(f'{name}/report.md')}).", ""]
        for picture in PICTURES:
            if (folder / name / picture).is_file():
                alt = markdown(f"{own}: {PICTURES[picture]}")
                lines += [f"![{alt}]({link(f'{name}/{picture}')})", ""]
    write_text(folder / REPORT, "\n".join(lines))
    return folder / REPORT


def _listed(path: Path) -> tuple[str, dict[str, str]]:
    """The title of a study, and its experiments: name -> title."""
    study = read_json(path, "list of a study's experiments")
    try:
        study = fitted(study, Mapping[str, Any], "a study", str(path))
        title = fitted(study.get("title"), str, "title", str(path))
        experiments = fitted(study.get("experiments"), Mapping[str, str], "experiments", str(path))
    except CordaError as error:
        raise ForeignFileError(f"{error}; run the study again") from None
    for name in experiments:
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ForeignFileError(f"{path}: {name!r} is no name of an experiment")
    return title, dict(experiments)
