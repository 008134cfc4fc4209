"""Run an experiment or a study: what the verb `run` does. A study's experiments are run one after another.

Each experiment of a study has its own folder below `runs/<study>/`, so several processes may share a study if each runs other
experiments of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corda_vlm.experiment.checks import check_run
from corda_vlm.experiment.load import read_run
from corda_vlm.experiment.spec import Run, StudyRun
from corda_vlm.files import write_json
from corda_vlm.run_files import REPORT, STUDY


def run(
    config: str | Path,
    *,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    only: Sequence[str] | None = None,
    fresh: bool = False,
    device: str | None = None,
) -> Path:
    """Run an experiment or a study, or go on with it; returns the folder of its results.

    What can be said to be wrong is said before PyTorch is imported, which takes far longer than a slip deserves.

    Args:
        config, output, overrides, only, fresh: as in `corda_vlm.experiment.load.read_run`.
        device: "cpu", "cuda", …, or "auto"; None for what the experiments say.

    Raises:
        CordaError: a config that cannot be, or a folder that holds another experiment's results.
        KeyboardInterrupt: after Ctrl-C, once what is in flight is saved; the same command goes on.
    """
    wanted = read_run(config, output=output, overrides=overrides, only=only, fresh=fresh)
    check_run(wanted)
    if isinstance(wanted, StudyRun):
        _run_study(wanted, device)
    else:
        _run_one(wanted, device)
    return wanted.folder


def _run_study(wanted: StudyRun, device: str | None) -> None:
    from corda_vlm.report.overview import write_overview

    study, folder = wanted.study, wanted.folder
    titles = {name: experiment.title or name for name, experiment in study.experiments.items()}
    write_json(folder / STUDY, {"title": study.title or study.name, "experiments": titles})
    for one in wanted.runs:
        _run_one(one, device)
        write_overview(folder)
    print(f"overview {folder / REPORT}")


def _run_one(wanted: Run, device: str | None) -> None:
    from corda_vlm.experiment.runner import run_experiment

    run_experiment(wanted, device=device)
