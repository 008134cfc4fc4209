"""A study: several experiments in one YAML file, run one after another by one command that resumes.

    name: study
    defaults: {model: emoji-clip, ...}       # what the experiments have in common
    experiments:
      digits: {suite: emoji-digits, ...}     # each as a file of `configs/` would have it, less the defaults
      caltech25: {suite: emoji-caltech25, ...}

A key that an experiment has takes the place of the default's as a whole: mappings are not merged.

Each experiment has its own folder below `runs/<study>/`, so several processes may share a study if each runs other
experiments of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.experiment.checks import check_chosen, check_experiment, check_output
from corda_vlm.experiment.folder import check_claim
from corda_vlm.experiment.load import (
    apply_overrides,
    load_experiment,
    parse_experiment,
    read_config,
)
from corda_vlm.experiment.spec import Experiment
from corda_vlm.files import entries, resolve, write_json
from corda_vlm.names import check_name
from corda_vlm.report.overview import write_overview
from corda_vlm.run_files import STUDY

_KEYS = ("name", "title", "defaults", "experiments")


@dataclass(frozen=True)
class Study:
    """Experiments that belong together.

    Attributes:
        name: names the folder `runs/<name>`.
        experiments: name -> experiment, which has that name.
        title: heading of the overview.
    """

    name: str
    experiments: Mapping[str, Experiment]
    title: str | None = None


def is_study(config: str | Path) -> bool:
    """Does this file declare a study, rather than one experiment?"""
    return "experiments" in read_config(config)


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study.

    Args:
        path: as given, or a shipped one, e.g. "configs/study.yaml".
        overrides: "key=value" as in `load_experiment`, for every experiment of the study.

    Raises:
        CordaError: not YAML, an unknown key, or an experiment that cannot be; names the file and the key.
    """
    path = resolve(path)
    content = read_config(path)
    for key in content:
        if key not in _KEYS:
            raise UnknownNameError(f"key in study {path}", key, _KEYS)
    name, defaults, experiments = (content.get(key) for key in ("name", "defaults", "experiments"))
    if name is None:
        raise CordaError(f"study {path}: no name; it names the folder of the results")
    check_name(name, f"the name of study {path}")
    title = content.get("title")
    if title is not None and not isinstance(title, str):
        raise CordaError(f"study {path}: title must be text, in quotes if need be")
    if not isinstance(experiments, Mapping) or not experiments:
        raise CordaError(
            f"study {path}: `experiments` must be a mapping of at least one experiment"
        )
    if not isinstance(defaults or {}, Mapping):
        raise CordaError(
            f"study {path}: `defaults` must be a mapping of the options of an experiment"
        )
    found = {}
    for key, own in experiments.items():
        check_name(key, f"an experiment's name in study {path}")
        if not isinstance(own, Mapping):
            raise CordaError(f"study {path}, experiment {key!r}: must be a mapping")
        merged: dict[str, Any] = {**(defaults or {}), **own, "name": key}
        merged = copy.deepcopy(merged)  # of defaults that experiments share
        apply_overrides(merged, overrides)
        found[key] = parse_experiment(merged, f"study {path}, experiment {key!r}")
    return Study(name, found, title)


def run_study(
    config: str | Path,
    *,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    only: Sequence[str] | None = None,
    fresh: bool = False,
    device: str | None = None,
) -> Path:
    """Run a study, or go on with it; returns the folder of its results.

    Args:
        only: names of the experiments to run; None for all.

    The others, and what is raised, as in `corda_vlm.experiment.runner.run`.
    """
    from corda_vlm.experiment.runner import command_of, run_experiment

    study = load_study(config, overrides)
    folder = Path(output) if output is not None else Path("runs") / study.name
    check_study(study, resolve(config), folder, only=only, fresh=fresh)
    titles = {name: experiment.title or name for name, experiment in study.experiments.items()}
    write_json(folder / STUDY, {"title": study.title or study.name, "experiments": titles})
    for name, experiment in study.experiments.items():
        if only is None or name in only:
            run_experiment(
                experiment,
                folder / name,
                command=command_of(config, overrides),
                config=resolve(config),
                fresh=fresh,
                device=device,
            )
            write_overview(folder)
    print(f"overview {folder / 'report.md'}")
    return folder


def check_config(
    config: str | Path,
    *,
    output: str | Path | None,
    overrides: Sequence[str] = (),
    only: Sequence[str] | None = None,
    fresh: bool = False,
) -> None:
    """Raise what can be told to be wrong with a run or a study before PyTorch is imported; arguments as of both."""
    path = resolve(config)
    if is_study(path):
        study = load_study(path, overrides)
        folder = Path(output) if output is not None else Path("runs") / study.name
        check_study(study, path, folder, only=only, fresh=fresh)
        return
    experiment = load_experiment(path, overrides)
    check_chosen(only, experiment.variants, "variant")
    folder = Path(output) if output is not None else Path("runs") / experiment.name
    check_output(folder, folder=True)
    check_experiment(experiment, path)
    check_claim(folder, experiment, fresh)


def check_study(
    study: Study, config: Path, folder: Path, *, only: Sequence[str] | None, fresh: bool
) -> None:
    """Raise what can be told to be wrong with a study before any of it is run."""
    check_chosen(only, study.experiments, "experiment")
    check_output(folder, folder=True)
    if entries(folder) and not (folder / STUDY).is_file():
        raise CordaError(
            f"{folder} is not empty and holds no study; give another folder with --output"
        )
    for name, experiment in study.experiments.items():
        if only is None or name in only:
            check_experiment(experiment, config)
            check_claim(folder / name, experiment, fresh)
