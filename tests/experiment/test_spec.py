"""Every shipped config reads, and a wrong one is told what is wrong with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation import load_suite
from corda_vlm.experiment.load import (
    is_study,
    load_experiment,
    load_study,
    parse_experiment,
)
from corda_vlm.files import asset

CONFIGS = sorted(asset("configs").glob("*.yaml"))
SHIPPED = [path for path in CONFIGS if not is_study(path)]
STUDIES = [path for path in CONFIGS if is_study(path)]
DEMO = yaml.safe_load(asset("configs/demo.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_an_experiment_with_a_suite(path):
    named: Any = load_study(path) if path in STUDIES else load_experiment(path)
    assert named.name == path.stem
    for experiment in named.experiments.values() if path in STUDIES else [named]:
        roles = {task.role for task in load_suite(experiment.suite).tasks}
        assert {"gain", "retention"} <= roles
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert f"corda-vlm run configs/{path.name}" in first, "a config begins with its command"
    text = path.read_text(encoding="utf-8")
    assert "# Expect" in text, "and says what result to expect"
    assert "TODO" not in text


def demo(**changes):
    content = copy.deepcopy(DEMO)
    for key, value in changes.items():
        at = content
        *parents, last = key.split("__")
        for parent in parents:
            at = at[parent]
        at[last] = value
    return content


def test_data_stays_as_it_is_written():
    data = {
        "source": "jsonl:a.jsonl",
        "format": "qa",
        "answer": "{work}\n#### {answer}",
        "where": {"level": "1"},
    }
    changes = {"task__data": data, "calibration__data": data, "training__loss": "next_token"}
    experiment = parse_experiment(demo(**changes), "demo.yaml")
    assert experiment.task.data["answer"] == "{work}\n#### {answer}"
    assert experiment.calibration.data["where"] == {"level": "1"}


def test_trainings_go_seed_by_seed():
    trainings = list(load_experiment("configs/demo.yaml").trainings())
    seeds = [training.seed for training in trainings]
    assert seeds == sorted(seeds)
    assert len({training.folder for training in trainings}) == len(trainings) == 18


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"datta": 1}, UnknownNameError, "unknown option in demo.yaml 'datta'"),
        ({"seeds": "many"}, CordaError, "seeds"),
        ({"variants": {}}, CordaError, "no variants"),
        ({"variants__lora__learning_rate": 1}, CordaError, "learning_rate"),
        ({"variants__lora__learning_rates": []}, CordaError, "no learning rates"),
        (
            {"variants__lora__learning_rates": ["fast"]},
            CordaError,
            "'fast'; it must be a finite number above 0",
        ),
        ({"variants__lora__method": "lroa"}, UnknownNameError, "Did you mean 'lora'"),
        ({"calibration": None}, CordaError, "corda-natural.*no `calibration`"),
        ({"training__step": 3}, UnknownNameError, "option in the training.*Did you mean 'steps'"),
        ({"training__steps": -3}, CordaError, "steps is -3"),
        ({"training__steps": "ten"}, CordaError, "steps cannot be 'ten'"),
        (
            {"training__bf16": "maybe"},
            CordaError,
            "training of 'corda-natural': bf16 cannot be 'maybe'; it must be true or false or 'auto'",
        ),
        (
            {"variants__base": {"method": "lora", "learning_rates": [1]}},
            CordaError,
            "called 'base'",
        ),
        (
            {"variants__Lora": {"method": "lora", "learning_rates": [1]}},
            CordaError,
            "'lora' and 'Lora' would share a folder",
        ),
        *(
            (
                {f"variants__{name}": {"method": "lora", "learning_rates": [1]}},
                CordaError,
                "a run writes a file of that name",
            )
            for name in ("scores.jsonl", "Config.yaml", "covariance.safetensors")
        ),
        ({"calibration__tokens": "answer"}, UnknownNameError, "calibration.tokens 'answer'"),
        ({"calibration__max_tokens": 1}, CordaError, "max_tokens is 1"),
        ({"training__loss": "next_token"}, CordaError, "say which format: the task's data has"),
        (
            {
                "task__data": {"source": "sklearn:digits", "format": "qa"},
                "training__loss": "prompt",
            },
            CordaError,
            r"'corda-natural' has the prompt loss.*\(format: qa\); give training: \{loss: next_token\}",
        ),
        ({"dtype": "bf16"}, UnknownNameError, "dtype 'bf16'.*float32"),
        ({"training__learning_rate": 1}, UnknownNameError, "option in the training"),
        ({"evaluation": {"scales": [2.5]}}, CordaError, r"scale 2\.5 is not between 0"),
        ({"variants__lora__scales": [-0.1]}, CordaError, r"'lora': scale -0\.1 is not between 0"),
        (
            {"variants__corda-kpm": {"dynamic_covariance": True, "learning_rates": [1]}},
            CordaError,
            "chooses among calibration rounds, and there is one",
        ),
        ({"variants__lora__dynamic_rank": True}, CordaError, "'lora' has no dynamic_rank"),
        ({"variants__full__a_norm": 10}, CordaError, "'full' has no a_norm"),
        ({"variants__lora__a_norm": 0}, CordaError, "a_norm is 0.0; it must be above 0"),
        (
            {"variants__linear-probe": {"learning_rates": [1], "scales": [0.5]}},
            CordaError,
            "linear head.*`scales: \\[\\]`",
        ),
        (
            {"variants__linear-probe": {"learning_rates": [1], "anchor": 1}},
            CordaError,
            "nothing to anchor",
        ),
        (
            {"variants__linear-probe": {"learning_rates": [1], "distill": 1}},
            CordaError,
            "'linear-probe' changes no layer, so that distill has nothing to hold",
        ),
        (
            {"variants": {"lora": {"learning_rates": [1], "distill": 1}}, "calibration": None},
            CordaError,
            "'lora' has distill, which looks at records of that knowledge, and the experiment has no `calibration`",
        ),
        (
            {"variants__linear-probe": {"learning_rates": [1], "keep": 0.9}},
            CordaError,
            "'linear-probe' changes no layer, so that it forgets nothing and keep has nothing to hold",
        ),
        (
            {"variants": {"lora": {"learning_rates": [1], "keep": 0.9}}, "calibration": None},
            CordaError,
            "'lora' is to keep a share of what the model knew, which records of that knowledge tell",
        ),
        (
            {
                "variants": {
                    "lora": {
                        "learning_rates": [1],
                        "keep": 0.9,
                        "keep_by": "anchor",
                        "probe": "folder:x",
                    }
                },
                "calibration": None,
            },
            CordaError,
            "'lora': keep_by anchor steers the anchor",
        ),
        (
            {
                "variants": {
                    "lora": {
                        "learning_rates": [1],
                        "keep": 0.9,
                        "keep_by": "anchor",
                        "anchor_metric": "task",
                        "probe": "folder:x",
                    }
                },
                "calibration": None,
            },
            CordaError,
            "'lora' is to keep a share by an anchor, .* no `calibration`",
        ),
        ({"variants__lora__keep": 95}, CordaError, "95 per cent is 0.95"),
        ({"variants__lora__keep": 0}, CordaError, "above 0"),
        ({"variants__lora__probe": "folder:x"}, CordaError, "probe= is for keep="),
        ({"variants__lora__distill": -1}, CordaError, "distill is -1"),
        ({"variants__lora__distill_loss": "l2"}, UnknownNameError, "distill_loss 'l2'"),
        (
            {"variants__lora__kl_new": 1, "training__loss": "contrastive"},
            CordaError,
            "'lora': kl_new compares probabilities .* the contrastive loss has none",
        ),
        (
            {"variants__lora__start_decay": 1, "training__weight_decay": 0.1},
            CordaError,
            "'lora': start_decay .* weight_decay .* choose one",
        ),
    ],
)
def test_a_wrong_experiment_names_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        parse_experiment(demo(**changes), "demo.yaml")


def test_the_chat_template_of_the_calibration_is_its_own_where_it_has_one():
    from corda_vlm.experiment.load import load_experiment

    def template(*overrides):
        experiment = load_experiment(asset("configs/smollm2.yaml"), overrides)
        return experiment.calibration_options("knowledge").chat_template

    assert template() == "plain", "the experiment's"
    assert template("calibration.chat_template=auto") == "auto"
    assert template("calibration.chat_template=vicuna") == "vicuna"
