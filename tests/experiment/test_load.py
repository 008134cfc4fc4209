"""Reading an experiment or a study: overrides of single keys, what experiments share, and what is to be run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.experiment.checks import check_run
from corda_vlm.experiment.load import (
    command_of,
    is_study,
    load_experiment,
    load_study,
    read_run,
)
from corda_vlm.experiment.spec import Run, StudyRun
from corda_vlm.files import asset

STUDY = {
    "name": "pair",
    "title": "Two small experiments",
    "defaults": {
        "model": "emoji-clip",
        "suite": "emoji-digits",
        "towers": ["vision"],
        "rank": 2,
        "task": {"data": "sklearn:digits", "templates": ["{}"]},
        "training": {"steps": 2},
        "variants": {"lora": {"learning_rates": [1e-3]}},
    },
    "experiments": {
        "low": {"title": "The lower rank"},
        "high": {"rank": 4, "evaluation": {"scales": [0.5]}},
    },
}


@pytest.fixture
def config(tmp_path):
    """Writes a study, with changes, and returns its path."""

    def write(**changes):
        path = tmp_path / "pair.yaml"
        path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
        return path

    return write


def test_overrides_reach_nested_keys_and_are_yaml():
    experiment = load_experiment("configs/demo.yaml", ["training.steps=7", "seeds=[3]", "rank=4"])
    assert experiment.training["steps"] == 7
    assert experiment.seeds == [3]
    assert experiment.rank == 4
    with pytest.raises(CordaError, match="KEY=VALUE"):
        load_experiment("configs/demo.yaml", ["seeds"])
    with pytest.raises(CordaError, match="'name' is 'demo', which has no keys"):
        load_experiment("configs/demo.yaml", ["name.x=1"])


def test_a_command_reads_its_overrides_back():
    overrides = ["training.steps=10", "title=It's small", "seeds=[0]"]
    command = shlex.split(command_of("configs/demo.yaml", overrides))
    assert command[:3] == ["corda-vlm", "run", "configs/demo.yaml"]
    assert command[3::2] == ["--set"] * 3
    assert command[4::2] == overrides


def test_a_file_that_is_no_experiment(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(CordaError, match=r"list\.yaml must be a mapping"):
        load_experiment(tmp_path / "list.yaml")
    (tmp_path / "torn.yaml").write_text("a: [1")
    with pytest.raises(CordaError, match=r"torn\.yaml is not YAML"):
        load_experiment(tmp_path / "torn.yaml")


def test_defaults_are_shared_and_overridden(config):
    study = load_study(config(), ["training.steps=3"])
    assert list(study.experiments) == ["low", "high"]
    low, high = study.experiments.values()
    assert (low.name, low.rank, low.title) == ("low", 2, "The lower rank")
    assert (high.name, high.rank, high.scales_of("lora")) == ("high", 4, [0.5])
    assert low.training["steps"] == high.training["steps"] == 3, "an override reaches both"


def test_tells_a_study_from_an_experiment(config):
    assert is_study(config())
    assert not is_study(asset("configs/demo.yaml"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"experiment": {}}, UnknownNameError, r"in study .*pair\.yaml 'experiment'.*experiments"),
        ({"name": None}, CordaError, r"study .*pair\.yaml: name cannot be None; it must be text"),
        ({"name": "a/b"}, CordaError, r"the name of study .*pair\.yaml cannot be 'a/b'"),
        ({"title": 3}, CordaError, "title cannot be 3; it must be text or null .*in quotes"),
        ({"plugins": "own.py"}, CordaError, "plugins cannot be 'own.py'; it must be a list"),
        ({"experiments": {}}, CordaError, "experiments is {}; it needs at least 1"),
        ({"experiments": {1: {}}}, CordaError, "an experiment's name in study .* must be text"),
        ({"experiments": {"low": 3}}, CordaError, "experiments.low cannot be 3; it must be a map"),
        ({"defaults": [1]}, CordaError, r"defaults cannot be \[1\]; it must be a mapping"),
        ({"experiments": {"low": {"rnak": 3}}}, CordaError, "experiment 'low'.*rnak"),
    ],
)
def test_a_wrong_study_is_told_what_is_wrong(config, changes, error, message):
    with pytest.raises(error, match=message):
        load_study(config(**changes))


def test_an_experiment_is_read_once_with_where_it_goes(monkeypatch):
    from corda_vlm.experiment import load

    reads = []
    read = load.read_yaml
    monkeypatch.setattr(load, "read_yaml", lambda path: reads.append(path) or read(path))
    run = read_run("configs/demo.yaml", overrides=["seeds=[3]"], only=["lora"])
    assert len(reads) == 1
    assert isinstance(run, Run)
    assert run.folder == Path("runs/demo")
    assert run.config.resolve() == asset("configs/demo.yaml").resolve()
    assert {(t.variant, t.seed) for t in run.trainings} == {("lora", 3)}
    assert not run.fresh


def test_of_a_study_each_experiment_goes_into_its_own_folder(config, tmp_path):
    run = read_run(config(), output=tmp_path / "out", only=["high"], fresh=True)
    assert isinstance(run, StudyRun)
    assert [(one.experiment.name, one.folder) for one in run.runs] == [
        ("high", tmp_path / "out" / "high")
    ]
    assert run.runs[0].fresh
    assert run.runs[0].only is None, "of an experiment all variants are trained"
    both = read_run(config())
    assert isinstance(both, StudyRun)
    assert len(both.runs) == 2
    check_run(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["middle"]}, "unknown experiment 'middle'"),
        ({"only": ["low", "low"]}, "'low' is given twice"),
        ({"overrides": ["model=emoji-clap"]}, "unknown model 'emoji-clap'"),
        ({"overrides": ["task.data=folder:none"]}, "no file 'none'"),
    ],
)
def test_what_names_and_paths_tell_is_said_of_every_experiment(config, options, message):
    with pytest.raises(CordaError, match=message):
        check_run(read_run(config(), **options))


def test_a_study_takes_no_folder_with_other_things(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(CordaError, match="holds no study"):
        check_run(read_run(config(), output=tmp_path / "out"))
