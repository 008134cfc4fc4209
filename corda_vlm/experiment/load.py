"""Read the YAML file of an experiment, with overrides of single keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corda_vlm.errors import CordaError, brief
from corda_vlm.experiment.spec import Experiment
from corda_vlm.files import resolve
from corda_vlm.options import read_options
from corda_vlm.yaml_file import parse_yaml, read_yaml

_MOST_PARENTS = 10


def load_experiment(
    path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Experiment:
    """Read and check an experiment.

    Args:
        path: as given, or a shipped one, e.g. "configs/demo.yaml".
        overrides: "key=value" with dots for nested keys, e.g. "training.steps=10"; values are YAML.

    Raises:
        CordaError: not YAML, an unknown key, or a value of the wrong type; names the file and the key.
    """
    content = read_config(path)
    apply_overrides(content, overrides)
    return parse_experiment(content, str(path))


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        CordaError: no such file, not YAML, or not a mapping.
    """
    path = resolve(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise CordaError(f"{path} must be a mapping of the options of an experiment")
    return content


def apply_overrides(content: dict[str, Any], overrides: Mapping[str, Any] | Sequence[str]) -> None:
    """Set nested keys of a config in place, see `load_experiment`."""
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_override, overrides)
    for key, value in pairs:
        _set(content, key, value)


def parse_experiment(content: Mapping[str, Any], where: str) -> Experiment:
    """An experiment from a mapping; `where` names it in errors.

    Raises:
        CordaError: as of `load_experiment`.
    """
    return read_options(Experiment, content, where)


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
