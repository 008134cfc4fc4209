"""A folder's results are of one model, one set of data and one set of tasks, and say how they came about."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from torch import nn

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.evaluation import load_suite
from corda_vlm.experiment.load import load_experiment
from corda_vlm.experiment.origin import (
    AUTOCAST,
    MEASURED_IN,
    TRAINED_IN,
    check_sources,
    cpu_name,
    describe,
    machine_of,
)
from corda_vlm.run_files import DESCRIPTION, MADE_FROM

SOURCES = {"the model": "m", "the task's data": "d"}


@pytest.fixture
def suite():
    task = {
        "name": "digits", "role": "gain", "kind": "zero_shot", "data": "sklearn:digits",
        "classes": {"from": "data"}, "templates": ["{}"],
    }  # fmt: skip
    return load_suite({"name": "small", "version": 3, "tasks": [task]})


def test_results_are_added_to_those_of_the_same_sources_and_of_fewer_tasks(tmp_path):
    check_sources(tmp_path, SOURCES)  # nothing is there yet
    (tmp_path / MADE_FROM).write_text(json.dumps(SOURCES))
    check_sources(tmp_path, SOURCES)
    check_sources(tmp_path, {**SOURCES, "the suite's task 'new'": "n"})


@pytest.mark.parametrize(
    ("now", "changed"),
    [
        ({**SOURCES, "the model": "other"}, "holds results of the model as it was before"),
        ({"the model": "m"}, "holds results of the task's data as it was before"),
        ({}, "of the model, the task's data as it was"),
    ],
)
def test_a_source_that_has_changed_is_named(tmp_path, now, changed):
    (tmp_path / MADE_FROM).write_text(json.dumps(SOURCES))
    with pytest.raises(CordaError, match=f"{changed}.*--output, or --fresh"):
        check_sources(tmp_path, now)


def test_a_file_that_is_no_list_of_sources_is_refused(tmp_path):
    (tmp_path / MADE_FROM).write_text('["the model"]')
    with pytest.raises(ForeignFileError, match="is no list of sources"):
        check_sources(tmp_path, SOURCES)


def test_a_tasks_digest_is_of_what_it_measures_wherever_it_is_written(suite, tmp_path):
    (task,) = suite.tasks
    digest = task.digest
    assert replace(task, source=tmp_path / "suite.yaml").digest == digest
    for other in (
        replace(task, limit=5),
        replace(task, templates=["a {}"]),
        replace(task, data="sklearn:digits2"),
        replace(task, options={"max_new_tokens": 3}),
    ):
        assert other.digest != digest


@pytest.mark.parametrize("name", ["template", "chat_template"])
def test_a_task_has_the_digest_that_folders_have_by_whichever_name_it_has_its_template(name):
    """The digests are those of the version in which the option was called `template`."""
    sums = {"name": "sums", "role": "gain", "kind": "qa", "limit": 5, "options": {name: "plain", "max_new_tokens": 2},
            "data": {"source": "jsonl:sums.jsonl", "format": "qa"}}  # fmt: skip
    (task,) = load_suite({"name": "s", "version": 1, "tasks": [sums]}).tasks
    assert task.digest == "c640870d0f73a996"


def test_the_digests_of_what_ships_and_of_tasks_without_options_are_those_of_before():
    shipped = {task.name: task.digest for task in load_suite("smollm2").tasks}
    assert shipped == {
        "gsm8k": "c16191d5abeda833", "nq-open": "83b91439a00c1cda", "triviaqa": "50590aa3b05a99f9",
    }  # fmt: skip
    plain = {"name": "plain", "role": "retention", "kind": "perplexity", "data": "jsonl:x.jsonl", "metrics": ["perplexity"]}  # fmt: skip
    digits = {"name": "digits", "role": "retention", "kind": "zero_shot", "data": "sklearn:digits", "classes": ["a", 1],
              "templates": ["a {}"]}  # fmt: skip
    tasks = load_suite({"name": "s", "version": 1, "tasks": [plain, digits]}).tasks
    assert [task.digest for task in tasks] == ["2fe00b8dca612fee", "172eb461c8153daf"]


def test_a_description_says_the_command_the_data_and_the_precisions(suite, tmp_path):
    experiment = replace(load_experiment("configs/demo.yaml", ["seeds=[4]"]), title=None)
    describe(
        tmp_path,
        experiment,
        command="corda-vlm run configs/demo.yaml",
        records=1234,
        suite=suite,
        machine="a toaster",
        precisions={TRAINED_IN: True, MEASURED_IN: False},
    )
    said = json.loads((tmp_path / DESCRIPTION).read_text())
    assert said["title"] == "demo", "the name, where there is no title"
    assert said["command"] == "corda-vlm run configs/demo.yaml"
    assert said["learnt from"].startswith("1,234 records of ")
    assert said["suite"] == "small, version 3"
    assert said["seeds"] == [4]
    assert said["machine"] == "a toaster"
    assert (said[TRAINED_IN], said[MEASURED_IN]) == (AUTOCAST, experiment.dtype)
    assert {"corda-vlm", "torch", "transformers", "peft"} == set(said["versions"])


def test_a_machine_is_named_by_its_processor():
    assert cpu_name()
    assert machine_of(nn.Linear(1, 1)).startswith(f"{cpu_name()}, ")
    assert machine_of(nn.Linear(1, 1)).endswith(" threads")
