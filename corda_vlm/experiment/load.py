"""Read the YAML file of an experiment or a study, once, with overrides of single keys; and what is to be run of it.

A study holds several experiments, which one command runs one after another:

    name: study
    defaults: {model: emoji-clip, ...}       # what the experiments have in common
    experiments:
      digits: {suite: emoji-digits, ...}     # each as a file of `configs/` would have it, less the defaults
      caltech25: {suite: emoji-caltech25, ...}

A key that an experiment has takes the place of the default's as a whole: mappings are not merged. But `plugins` of the study
are those of each of its experiments too.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from corda_vlm.errors import CordaError, brief
from corda_vlm.experiment.spec import Experiment, Run, Study, StudyRun
from corda_vlm.files import resolve
from corda_vlm.names import check_name
from corda_vlm.options import Items, Text, read_options
from corda_vlm.plugins import OPTION, named_in_command, run_plugins
from corda_vlm.yaml_file import parse_yaml, read_yaml

Overrides = Mapping[str, Any] | Sequence[str]

_MOST_PARENTS = 10


def read_run(
    config: str | Path,
    *,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    only: Sequence[str] | None = None,
    fresh: bool = False,
) -> Run | StudyRun:
    """Read what is to be run of an experiment or a study; `corda_vlm.experiment.checks.check_run` says if it can be.

    Args:
        config: a YAML file, as given or a shipped one, e.g. "configs/demo.yaml".
        output: the folder of the results; None for runs/<name>.
        overrides: "key=value" pairs, see `load_experiment`.
        only: names of the experiment's variants, or of the study's experiments; None for all.
        fresh: delete the folder's former results first.

    Raises:
        CordaError: a config that cannot be.
    """
    declared = load_config(config, overrides)
    command, path = command_of(config, overrides), resolve(config)
    folder = Path(output) if output is not None else Path("runs") / declared.name
    if isinstance(declared, Experiment):
        return Run(declared, folder, path, command, only, fresh)
    runs = [
        Run(experiment, folder / name, path, command, fresh=fresh)
        for name, experiment in declared.experiments.items()
        if only is None or name in only
    ]
    return StudyRun(declared, folder, runs, only)


def command_of(config: str | Path, overrides: Sequence[str]) -> str:
    """What a person types to get the same results."""
    pairs = [word for override in overrides for word in ("--set", override)]
    plugins = [word for file in named_in_command() for word in (OPTION, file)]
    return shlex.join(["corda-vlm", "run", str(config), *pairs, *plugins])


def load_config(path: str | Path, overrides: Overrides = ()) -> Experiment | Study:
    """Read and check an experiment or a study, whichever the file declares; otherwise as `load_experiment`."""
    content = _read(path)
    if _is_study(content):
        return _parse_study(content, resolve(path), overrides)
    return _parse_experiment(content, path, overrides)


def load_experiment(path: str | Path, overrides: Overrides = ()) -> Experiment:
    """Read and check an experiment; its plugins are run.

    Args:
        path: as given, or a shipped one, e.g. "configs/demo.yaml".
        overrides: "key=value" with dots for nested keys, e.g. "training.steps=10"; values are YAML. For every experiment
            of a study.

    Raises:
        CordaError: not YAML, an unknown key, or a value of the wrong type; names the file and the key.
    """
    return _parse_experiment(_read(path), path, overrides)


def load_former(path: Path) -> Experiment:
    """What a run wrote of its experiment. Its plugins are not run: a folder of results does not say what is executed."""
    return parse_experiment(_read(path), str(path))


def load_study(path: str | Path, overrides: Overrides = ()) -> Study:
    """Read and check a study; otherwise as `load_experiment`."""
    return _parse_study(_read(path), resolve(path), overrides)


def is_study(path: str | Path) -> bool:
    """Does this file declare a study, rather than one experiment?"""
    return _is_study(_read(path))


def parse_experiment(content: Mapping[str, Any], where: str) -> Experiment:
    """An experiment from a mapping; `where` names it in errors.

    Raises:
        CordaError: as of `load_experiment`.
    """
    return read_options(Experiment, content, where)


def _parse_experiment(
    content: dict[str, Any], path: str | Path, overrides: Overrides
) -> Experiment:
    """An experiment with its overrides, once its plugins have run."""
    _override_all(content, overrides)
    _run_plugins(content, path)
    return parse_experiment(content, str(path))


# ------------------------------------------------------------------ studies


def _is_study(content: Mapping[str, Any]) -> bool:
    return "experiments" in content


@dataclass(frozen=True)
class _StudyFile:
    """What the file of a study holds.

    Attributes:
        name: names the folder of the results.
        experiments: name -> what it has beside the defaults.
        title: heading of the overview.
        defaults: what the experiments have in common.
        plugins: run before those of each experiment.
    """

    name: Text
    experiments: Annotated[dict[Any, dict[Any, Any]], Items(least=1)]
    title: str | None = None
    defaults: dict[Any, Any] | None = None
    plugins: list[Text] | None = None


def _parse_study(content: Mapping[str, Any], path: Path, overrides: Overrides) -> Study:
    where = f"study {path}"
    written = read_options(_StudyFile, content, where)
    check_name(written.name, f"the name of {where}")
    experiments = {name: _parse_one(name, written, path, overrides) for name in written.experiments}
    return Study(written.name, experiments, written.title)


def _parse_one(name: Any, written: _StudyFile, path: Path, overrides: Overrides) -> Experiment:
    """One experiment of a study."""
    check_name(name, f"an experiment's name in study {path}")
    # a copy, as experiments share the defaults
    content: dict[str, Any] = copy.deepcopy(
        {**(written.defaults or {}), **written.experiments[name], "name": name}
    )
    _override_all(content, overrides)
    _add_plugins(content, written.plugins or [])
    _run_plugins(content, path)
    return parse_experiment(content, f"study {path}, experiment {name!r}")


def _add_plugins(content: dict[str, Any], plugins: Sequence[str]) -> None:
    """The plugins of a study, before those of its experiment."""
    own = content.get("plugins") or []
    if plugins and isinstance(own, list):  # what it must be is said where the experiment is parsed
        content["plugins"] = [*plugins, *(one for one in own if one not in plugins)]


# ------------------------------------------------------------------ files and overrides


def _read(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    path = resolve(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise CordaError(f"{path} must be a mapping of the options of an experiment")
    return content


def _run_plugins(content: Mapping[str, Any], config: str | Path) -> None:
    """Run the plugins that a config names, before it is looked at what they register."""
    plugins = content.get("plugins")
    if isinstance(plugins, list) and all(isinstance(one, str) for one in plugins):
        run_plugins(plugins, resolve(config))


def _override_all(content: dict[str, Any], overrides: Overrides) -> None:
    """Set nested keys of a config in place."""
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_override, overrides)
    for key, value in pairs:
        _set(content, key, value)


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise CordaError(
            f"an override is written KEY=VALUE, e.g. training.steps=10; got {brief(text)}"
        )
    return key, parse_yaml(value, f"the value of {brief(key)}")


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    if len(parents) > _MOST_PARENTS:
        raise CordaError(f"{brief(key)} leads deeper than any option of an experiment lies")
    for parent in parents:
        inner = content.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise CordaError(f"{key}: {parent!r} is {brief(inner)}, which has no keys")
        content = inner
    content[last] = value
