"""The table of the kinds of tasks: what it says of each is what its class does, and one line more is a kind more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest

from corda_vlm.errors import UnknownNameError
from corda_vlm.evaluation import Outcome, evaluate, load_suite
from corda_vlm.evaluation.models.encoder import Encoder
from corda_vlm.evaluation.tasks.base import Evaluator
from corda_vlm.evaluation.tasks.registry import TASK_KINDS, TaskKind


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_the_table_says_what_the_class_does(kind):
    declared = TASK_KINDS[kind]
    measured_by = declared.load()
    assert issubclass(measured_by, Evaluator)
    default = {field.name: field.default for field in fields(measured_by)}
    assert default["metrics"] == (declared.usual or declared.metrics)
    assert set(declared.usual) <= set(declared.metrics)
    if declared.options is not None:
        assert issubclass(measured_by, declared.options)


@dataclass(frozen=True)
class Brightness(Evaluator):
    """How bright the pictures are: a task of one's own."""

    data: Any
    metrics: tuple[str, ...] = ("brightness",)

    def outcomes(self, encoder: Encoder) -> Iterator[Outcome]:
        bright = [np.asarray(record["image"]).mean() / 255 for record in self.data]
        yield Outcome("brightness", np.asarray(bright))


def test_one_line_more_is_a_kind_more(monkeypatch, tiny_clip_hf, tiny_processor, colour_folder):
    task = {
        "name": "light",
        "role": "retention",
        "kind": "brightness",
        "data": f"folder:{colour_folder}",
    }
    suite = {"name": "own", "version": 1, "tasks": [task]}
    with pytest.raises(UnknownNameError, match=r"unknown kind in .* 'brightness'"):
        load_suite(suite)
    monkeypatch.setitem(TASK_KINDS, "brightness", TaskKind(Brightness, ("brightness",)))
    (score,) = evaluate(tiny_clip_hf, suite, processor=tiny_processor)
    assert score.metric == "brightness"
    assert 0 < score.value < 1
