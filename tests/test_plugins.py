"""Plugins: run because the user names them, said in one line, part of what a run was made from, and never found."""

from __future__ import annotations

import hashlib
import json

import pytest
import yaml

from corda_vlm.__main__ import main
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.experiment.load import load_experiment, load_study, read_run
from corda_vlm.experiment.runner import ExperimentRunner
from corda_vlm.experiment.study import run
from corda_vlm.methods import METHODS
from corda_vlm.plugins import named_in_command, of_command, run_plugin, without_plugins

pytestmark = pytest.mark.usefixtures("own_registrations")

PLUGIN = """
from dataclasses import dataclass

from corda_vlm import register_method
from corda_vlm.methods import Method

@dataclass
class Held:  # a dataclass looks its module up
    name: str = "biases"

def attach(model, request):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias")
    return model

register_method(Method(Held().name, "biases alone", "BitFit", (), attach, lambda model: model))
"""

SUITE = {
    "name": "small",
    "version": 1,
    "tasks": [
        {"name": "digits", "role": "gain", "kind": "zero_shot", "limit": 20, "templates": ["{}"],
         "classes": {"from": "data"}, "data": {"source": "sklearn:digits", "split": "test"}},
    ],
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    """An experiment whose only variant is the plugin's method; it names the plugin if it is told to."""
    (tmp_path / "own.py").write_text(PLUGIN)
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    experiment = {
        "model": "emoji-clip",
        "suite": str(tmp_path / "suite.yaml"),
        "task": {"data": {"source": "sklearn:digits", "split": "train", "limit": 32}},
        "training": {"steps": 2, "batch_size": 16},
        "variants": {"biases": {"learning_rates": [1e-3]}},
    }

    def write(study: bool = False, **more):
        content = {"name": "small", **experiment, **more}
        if study:
            content = {"name": "all", "experiments": {"small": experiment}, **more}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "small.yaml"

    return write


def test_a_config_runs_the_plugin_beside_it_and_says_so(config, capsys, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "own.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(UnknownNameError, match="method of variant 'biases'"):
        load_experiment(config())
    assert load_experiment(config(plugins=["own.py"])).plugins == ["own.py"]
    assert capsys.readouterr().out == f"running the plugin {tmp_path / 'own.py'}\n"
    assert "biases" in METHODS
    load_experiment(config(plugins=["own.py"]))
    assert capsys.readouterr().out == "", "once in a process"


def test_a_study_runs_it_for_each_of_its_experiments(config):
    study = load_study(config(study=True, plugins=["own.py"]))
    assert study.experiments["small"].plugins == ["own.py"]
    with pytest.raises(CordaError, match=r"plugins cannot be 'own.py'; it must be a list"):
        load_study(config(study=True, plugins="own.py"))


def test_an_override_names_one_too(config):
    assert load_experiment(config(), ["plugins=[own.py]"]).variants


def test_a_run_notes_it_and_refuses_to_go_on_with_another(config, tmp_path, capsys):
    path = config(plugins=["own.py"])
    folder = run(path, output=tmp_path / "out")
    made_from = json.loads((folder / "made-from.json").read_text())
    assert len(made_from["the plugin 'own.py'"]) == 16
    run(path, output=folder)  # goes on
    (tmp_path / "elsewhere").mkdir()  # as in another process
    changed = tmp_path / "elsewhere" / "own.py"
    changed.write_text(PLUGIN.replace("biases", "fewer biases"))
    other = [f"plugins=[{changed}]", "variants={fewer biases: {learning_rates: [1e-3]}}"]
    with pytest.raises(CordaError, match=r"holds results of the plugin 'own\.py' as it was before"):
        run(path, output=folder, overrides=other)


def test_a_folder_of_results_does_not_say_what_is_executed(config, tmp_path, capsys):
    folder = run(config(plugins=["own.py"]), output=tmp_path / "out")
    trap = tmp_path / "trap.py"
    trap.write_text("raise RuntimeError('executed')")
    told = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(told.replace("own.py", str(trap)))
    run(config(plugins=["own.py"]), output=folder)
    main(["report", str(folder)])
    assert "executed" not in capsys.readouterr().out


def test_every_verb_takes_it_on_the_command_line(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config()
    main(["run", "small.yaml", "--plugin", "own.py", "--output", "out"])
    assert f"running the plugin {tmp_path / 'own.py'}" in capsys.readouterr().out
    assert "the plugin 'own.py'" in json.loads((tmp_path / "out" / "made-from.json").read_text())
    assert "--plugin own.py" in (tmp_path / "out" / "report.md").read_text()
    assert named_in_command() == ()
    main(["--plugin=own.py", "sites", "emoji-clip", "--towers", "text"])
    assert "parameters" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["sites", "emoji-clip", "--plugin", "gone.py"])
    assert "gone.py" in capsys.readouterr().err


def test_a_command_without_its_plugins():
    words = ["run", "--plugin", "a.py", "x.yaml", "--plugin=b.py", "--set", "a=--plugin"]
    assert without_plugins(words) == (["run", "x.yaml", "--set", "a=--plugin"], ["a.py", "b.py"])
    for short in (["run", "--plugin"], ["--plugin=", "run"]):
        with pytest.raises(CordaError, match="--plugin needs a value"):
            without_plugins(short)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("bad.py", "x = 1\n\nraise KeyError('oh')", "bad.py failed in line 3: KeyError: 'oh'"),
        ("bad.py", "x = = 1", "bad.py failed in line 1: SyntaxError"),
        ("bad.py", "import sys\nsys.exit('enough')", "bad.py failed in line 2: SystemExit: enough"),
        ("bad.py", "import nowhere_to_be_found", "ModuleNotFoundError"),
        ("bad.yaml", "", r"bad.yaml is no Python file; its name ends in \.py"),
        ("bad", "", "is no Python file"),
    ],
)
def test_what_cannot_be_run_is_named(name, text, why, tmp_path):
    (tmp_path / name).write_text(text)
    for _ in range(2):
        with pytest.raises(CordaError, match=why):
            run_plugin(tmp_path / name)


def test_a_file_that_is_not_there_or_is_none(tmp_path):
    with pytest.raises(CordaError, match=r"no plugin at .*gone"):
        run_plugin("gone.py", tmp_path / "config.yaml")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(CordaError, match="a plugin was expected"):
        run_plugin(tmp_path / "folder.py")


def test_one_that_has_changed_since_it_ran_is_refused(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("x = 1")
    first = run_plugin(path)
    assert run_plugin(str(path)) == first
    path.write_text("x = 2")
    with pytest.raises(CordaError, match="has changed since; start a new process"):
        run_plugin(path)


def test_two_of_one_name_are_refused_and_no_bytecode_is_left(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(f"x = {folder!r}")
    files = [str(tmp_path / folder / "own.py") for folder in ("a", "b")]
    with pytest.raises(CordaError, match=r"two plugins are called 'own\.py'"), of_command(files):
        pass
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_plugin_of_the_command_is_the_one_that_ran_also_where_another_lies_beside_the_config(
    config, tmp_path, monkeypatch, capsys
):
    """What results are made from names the file that the command meant, and runs no other."""
    path = config()
    (tmp_path / "cwd").mkdir()
    own = (tmp_path / "own.py").read_text()
    (tmp_path / "cwd" / "own.py").write_text(own)
    (tmp_path / "own.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path / "cwd")
    with of_command(["own.py"]):
        sources = ExperimentRunner(read_run(path, output=tmp_path / "out"), "cpu").sources
    assert sources["the plugin 'own.py'"] == hashlib.sha256(own.encode()).hexdigest()[:16]
