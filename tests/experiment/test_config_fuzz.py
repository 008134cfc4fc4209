"""Configs and suites with anything anywhere: they read, or a `CordaError` says what is wrong."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest

from corda_vlm.errors import CordaError
from corda_vlm.evaluation import load_suite
from corda_vlm.experiment.load import parse_experiment
from corda_vlm.files import asset
from corda_vlm.yaml_file import read_yaml

pytestmark = pytest.mark.unchecked  # anything anywhere is of wrong types

ODD = [
    None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**400, "", "x" * 5000, "\0", "~nosuchuser", "../..", [], [1],
    [[]], ["a", "a"], {}, {"a": 1}, {1: 2}, {"class_path": "os.path"},
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()  # fmt: skip
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(value: Any, chance: random.Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        if not (paths := list(places(value))):
            return value
        *parents, last = chance.choice(paths)
        at = value
        for key in parents:
            at = at[key]
        what = chance.random()
        if what < 0.7:
            at[last] = copy.deepcopy(chance.choice(ODD))
        elif what < 0.85 and isinstance(at, dict):
            at[chance.choice([1, None, "zz", True])] = at.pop(last)
        else:
            del at[last]
    return value


FILES = [
    *(path for path in sorted(asset("configs").glob("*.yaml")) if path.stem != "study"),
    *sorted(asset("eval/suites").glob("*.yaml")),
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_a_corda_error_comes_out(path):
    chance, content = random.Random(path.stem), read_yaml(path)
    refused = 0
    for _ in range(60):
        wrong = mutated(content, chance)
        with contextlib.suppress(CordaError):
            if path.parent.name == "configs":
                parse_experiment(wrong, path.name)
            else:
                load_suite(wrong)
            continue
        refused += 1
    assert refused > 10, "most of what is odd is refused"
