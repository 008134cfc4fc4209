"""What can be said to be wrong before PyTorch is imported, a model loaded, or a file of a run touched.

Each check raises a `CordaError`; what they let pass may still turn out wrong where it is used, and says so there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from corda_vlm.adapter.options import check_scales
from corda_vlm.data.sources.registry import SOURCES
from corda_vlm.data.spec import DataSpec, parse_spec, with_root
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation.class_names import OPENAI, SIMPLE, load_class_names, load_templates
from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.evaluation.suite import Suite, load_suite
from corda_vlm.experiment.folder import check_claim
from corda_vlm.experiment.spec import Experiment, Run, StudyRun
from corda_vlm.extras import check_installed
from corda_vlm.families.loading.sources import check_family, check_source
from corda_vlm.files import check_path, entries, shown
from corda_vlm.run_files import STUDY


def check_run(run: Run | StudyRun) -> None:
    """What is to be run is there, and what it writes to is its own, as far as can be said before PyTorch is imported."""
    if isinstance(run, StudyRun):
        _check_study(run)
        return
    check_chosen(run.only, run.experiment.variants, "variant")
    check_installed("matplotlib", "report", "The report of a run")
    check_output(run.folder, folder=True)
    check_experiment(run.experiment, run.config)
    check_claim(run.folder, run.experiment, run.fresh)


def _check_study(run: StudyRun) -> None:
    check_chosen(run.only, run.study.experiments, "experiment")
    check_output(run.folder, folder=True)
    if entries(run.folder) and not (run.folder / STUDY).is_file():
        raise CordaError(
            f"{run.folder} is not empty and holds no study; give another folder with --output"
        )
    for one in run.runs:
        check_run(one)


def check_experiment(experiment: Experiment, config: Path) -> None:
    """Its model, suite, data, class names and templates are there, as far as names and paths tell.

    Args:
        config: the file it was read from; paths may be relative to it.
    """
    check_family(experiment.family)
    check_source(experiment.model)
    suite = load_suite(experiment.suite)
    root = experiment.data_root or suite.data_root
    check_data(experiment.task.data, config, root)
    if experiment.calibration is not None:
        check_data(experiment.calibration.data, config, root)
    for variant in experiment.variants.values():
        if variant.probe is not None:
            check_data(variant.probe, config, root)
    check_class_names(experiment.task.classes, experiment.task.templates, config)
    check_evaluation(suite, experiment.eval_options)


def check_suite(suite: Suite, root: str, tasks: Iterable[str] | None = None) -> None:
    """The data, class names and templates of a suite's tasks are there; of `tasks` alone, None for all."""
    for task in suite.tasks:
        if tasks is not None and task.name not in tasks:
            continue
        check_data(task.data, task.source, root)
        named = task.classes.get("names") if isinstance(task.classes, Mapping) else task.classes
        check_class_names(named, task.templates, task.source)
        if isinstance(task.classes, Mapping):
            other = task.classes.get("from")
            if other is not None and other != "data":
                check_data(other, task.source, root)


def check_evaluation(suite: str | Path | Suite, options: EvalOptions) -> Suite:
    """A suite is there with the chosen tasks, and their data, unless what is missing is to be left out. Returns it."""
    measured = load_suite(suite)
    check_chosen(
        options.tasks, [task.name for task in measured.tasks], f"task of suite {measured.name}"
    )
    if options.missing == "error":
        check_suite(measured, str(options.data_root or measured.data_root), options.tasks)
    return measured


def check_strengths(scales: str | None, adapter: str | None) -> tuple[float, ...]:
    """The strengths that a text lists, each once, the strongest first; the trained model alone where there is none."""
    if scales is None:
        return (1.0,)
    try:
        numbers = [float(part) for part in scales.split(",")]
    except ValueError:
        raise CordaError(
            f"--scales is numbers separated by commas, e.g. 0.25,0.5,1; got {scales!r}"
        ) from None
    if adapter is None:
        raise CordaError(
            "--scales mixes the model before training with the trained one: give the model before training as MODEL "
            "and the folder of the training as --adapter"
        )
    return check_scales(numbers)


def check_class_names(classes: Any, templates: Any, beside: Path | None) -> None:
    """Files of class names and templates are there and read."""
    if isinstance(classes, str) and classes != OPENAI:
        load_class_names(classes, beside)
    if templates is not None and templates not in (OPENAI, SIMPLE):
        load_templates(templates, beside)


def check_data(spec: Any, beside: Path | None = None, root: str | Path | None = None) -> None:
    """The files and folders that a data spec names are there."""
    parsed = parse_spec(
        spec if root is None or isinstance(spec, DataSpec) else with_root(spec, root)
    )
    if (check := SOURCES[parsed.kind].check) is not None:
        check(parsed, beside)


def check_chosen(chosen: Iterable[str] | None, known: Iterable[str], what: str) -> None:
    """Names to choose by are known, and each is given once."""
    seen = set()
    for name in chosen or ():
        if name not in (choices := list(known)):
            raise UnknownNameError(what, name, choices)
        if name in seen:
            raise CordaError(f"{what} {name!r} is given twice; each counts once")
        seen.add(name)


def check_file(path: str | Path | None, what: str, then: str = "") -> None:
    """A file that is to be read is there.

    Args:
        what: says what it should be, e.g. "plan".
        then: what to do where there is none.
    """
    if path is None:
        return
    mode = _mode(path)
    if mode is None:
        raise CordaError(f"no {what} file at {shown(path)}{then and '; '}{then}")
    if not stat.S_ISREG(mode):
        raise CordaError(f"{shown(path)} is no file; give the path of a {what} file")


def check_folder(path: str | Path, what: str, then: str = "") -> None:
    """A folder that is to be read is there; as of `check_file`."""
    mode = _mode(path)
    if mode is None or not stat.S_ISDIR(mode):
        raise CordaError(f"no {what} folder {shown(path)}{then and '; '}{then}")


def check_output(path: str | Path | None, *, folder: bool = False) -> None:
    """A file (or folder) can be written there, as far as can be told without writing."""
    if path is None:
        return
    path = Path(path)
    mode = _mode(path)
    if mode is not None:
        if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
            raise CordaError(
                f"{shown(path)} is no {'folder' if folder else 'file'}, so that nothing can be written there; give another "
                "path"
            )
        if folder and not os.access(path, os.W_OK | os.X_OK):
            raise CordaError(f"{shown(path)} cannot be written to; give another folder")
    above = path if mode is not None and folder else path.absolute().parent
    while (kind := _mode(above)) is None:
        above = above.parent
    if not stat.S_ISDIR(kind):
        raise CordaError(f"{shown(path)} cannot be written: {shown(above)} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise CordaError(
            f"{shown(path)} cannot be written: {shown(above)} is not writable; give another path"
        )


def _mode(path: str | Path) -> int | None:
    """What lies there, None for nothing."""
    check_path(path)
    try:
        return Path(path).stat().st_mode
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CordaError(f"{shown(path)} is no path that can be used: {reason}") from error
