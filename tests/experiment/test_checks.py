"""What can be said to be wrong with an experiment's evaluation before PyTorch is imported, and what a run then measures."""

from __future__ import annotations

import logging

import pytest
import yaml

from corda_vlm.errors import CordaError, DataError, UnknownNameError
from corda_vlm.experiment.checks import check_run, check_strengths
from corda_vlm.experiment.load import read_run
from corda_vlm.experiment.runner import ExperimentRunner

TASK = {
    "kind": "zero_shot", "limit": 20, "data": "sklearn:digits", "classes": {"from": "data"}, "templates": ["{}"],
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    """A run whose suite has a task without its data, with these options of evaluation."""
    suite = {
        "name": "two", "version": 1, "data_root": str(tmp_path),
        "tasks": [
            {**TASK, "name": "digits", "role": "gain"},
            {**TASK, "name": "lost", "role": "retention", "data": "folder:{data_root}/nowhere"},
        ],
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    config = {
        "name": "small", "model": "emoji-clip", "suite": str(tmp_path / "suite.yaml"),
        "task": {"data": "sklearn:digits"}, "variants": {"lora": {"learning_rates": [1e-3]}},
    }  # fmt: skip

    def read(**evaluation):
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**config, "evaluation": evaluation}))
        return read_run(path, output=tmp_path / "run")

    return read


def test_the_tasks_of_an_evaluation_are_known_and_their_data_there(read, tmp_path):
    with pytest.raises(UnknownNameError, match=r"unknown task of suite two 'digit'.*'digits'"):
        check_run(read(tasks=["digit"]))
    with pytest.raises(DataError, match="nowhere"):
        check_run(read())
    check_run(read(tasks=["digits"]))
    check_run(read(missing="skip"))
    (tmp_path / "elsewhere" / "nowhere" / "zero").mkdir(parents=True)
    check_run(read(data_root=str(tmp_path / "elsewhere")))


def test_a_run_measures_what_is_there_where_it_may_skip_the_rest(read, caplog):
    with caplog.at_level(logging.WARNING):
        assert [*ExperimentRunner(read(missing="skip"), "cpu").tasks] == ["digits"]
    assert "task lost is left out" in caplog.text
    assert [*ExperimentRunner(read(tasks=["digits"]), "cpu").tasks] == ["digits"]


def test_the_strengths_of_a_sweep():
    assert check_strengths(None, None) == (1.0,)
    assert check_strengths("0.5,1,0.25,0.5", "adapter") == (1.0, 0.5, 0.25)
    for scales, adapter, message in (("half", "adapter", "numbers"), ("1", None, "--adapter"), ("3", "adapter", "between 0")):  # fmt: skip
        with pytest.raises(CordaError, match=message):
            check_strengths(scales, adapter)
