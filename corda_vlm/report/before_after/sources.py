"""From what was named to the models that are compared: one before training, and one or more after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from corda_vlm.errors import CordaError
from corda_vlm.names import quoted
from corda_vlm.report.formats.base import Measured
from corda_vlm.report.formats.registry import read_results


def read_before(paths: Sequence[str]) -> Measured:
    """The one model before training; results of several tools are put together.

    Raises:
        ForeignFileError: no results, or damaged ones.
        CordaError: several models.
    """
    models = []
    for path in paths:
        name, place = _split(path)
        found = read_results(place)
        bases = [model for model in found if model.is_base]
        found = bases if len(bases) == 1 else found
        if len(found) > 1:
            names = quoted(model.name for model in found)
            raise CordaError(
                f"{place} holds the results of {len(found)} models: {names}; give the folder or file of the one before training"
            )
        model = found[0]
        own = "the base model" if model.is_base else Path(place).resolve().stem
        models.append(replace(model, name=name or own))
    return _together(models[0].name, models)


def read_after(paths: Sequence[str]) -> list[Measured]:
    """The trained models, in the order in which they were named; equal names are one model.

    Raises:
        ForeignFileError: no results, or damaged ones.
        CordaError: two models of one folder have one name.
    """
    by_name: dict[str, list[Measured]] = {}
    for path in paths:
        name, place = _split(path)
        found = read_results(place)
        trained = [model for model in found if not model.is_base] or found
        for model in trained:
            own = name or Path(place).resolve().stem
            if len(trained) > 1:
                own = f"{name} {model.name}" if name else model.name
            by_name.setdefault(own, []).append(model)
    return [_together(name, models) for name, models in by_name.items()]


def _split(path: str) -> tuple[str, str]:
    """NAME and PATH; a path that has an equals sign itself and is there is a path."""
    name, equals, place = path.partition("=")
    if not equals or Path(path).exists() or "/" in name:
        return "", path
    if not name or not place:
        raise CordaError(f"{path!r} is neither a path nor NAME=PATH")
    return name, place


def _together(name: str, models: Sequence[Measured]) -> Measured:
    """One model from the results of several tools."""
    seen: dict[str, Path] = {}
    for model in models:
        for task in model.tasks:
            measure = model.of(task)
            assert measure is not None
            if task in seen:
                raise CordaError(
                    f"the task {task!r} of {name!r} is in two results, {seen[task]} and {measure.file}; leave one of them out, or "
                    "give models names of their own: --after NAME=PATH"
                )
            seen[task] = measure.file
    tools = tuple(dict.fromkeys(tool for model in models for tool in model.tools))
    measures = tuple(measure for model in models for measure in model.measures)
    return Measured(name, tools, measures, models[0].is_base)
