"""One experiment end to end on the real emoji-clip, small; interrupted, resumed, added to."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import yaml

from corda_vlm.covariance import GradientStore
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation import read_rows
from corda_vlm.experiment import run
from corda_vlm.experiment.folder import claim
from corda_vlm.experiment.load import load_experiment
from corda_vlm.files import asset

SUITE = {
    "name": "small",
    "version": 1,
    "tasks": [
        {"name": "digits", "role": "gain", "kind": "zero_shot", "limit": 60,
         "data": {"source": "sklearn:digits", "split": "test"}, "classes": {"from": "data"}, "templates": ["{}"]},
        {"name": "emoji", "role": "retention", "kind": "zero_shot", "limit": 60,
         "data": {"source": "parquet:model_zoo/emoji-clip/data/twemoji.parquet", "where": {"split": "heldout"},
                  "label": "group"},
         "classes": {"from": "data"}, "templates": ["{}"]},
    ],
}  # fmt: skip

EXPERIMENT = {
    "name": "small",
    "model": "emoji-clip",
    "suite": "suite.yaml",
    "towers": ["vision"],
    "rank": 4,
    "calibration": {
        "data": {"source": "parquet:model_zoo/emoji-clip/data/noto.parquet", "split": "train"},
        "samples": 48,
        "batch_size": 16,
    },
    "task": {
        "data": {"source": "sklearn:digits", "split": "train", "limit": 64},
        "templates": ["{}"],
    },
    "training": {"steps": 4, "batch_size": 16},
    "variants": {
        "corda-kpm": {"a_norm": 10, "learning_rates": [1e-3]},
        "preview": {"method": "corda-ipm", "learning_rates": [1e-3]},
        "full": {"learning_rates": [1e-4]},
        "linear-probe": {"learning_rates": [1e-1], "training": {"steps": 40}},
    },
}


@pytest.fixture
def config(tmp_path):
    """Writes an experiment, with changes, and returns its path."""

    def write(**changes):
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
        path = tmp_path / "small.yaml"
        path.write_text(
            yaml.safe_dump({**EXPERIMENT, "suite": str(tmp_path / "suite.yaml"), **changes})
        )
        return path

    return write


def test_end_to_end_then_again_then_more(config, tmp_path, capsys):
    folder = run(config(), output=tmp_path / "out")
    files = {path.name for path in folder.iterdir()}
    assert {
        "config.yaml",
        "run.json",
        "scores.jsonl",
        "report.md",
        "report.html",
        "tradeoff.png",
    } <= files
    assert {"covariance.safetensors", "covariance-task.safetensors"} <= files, (
        "both kinds of covariance"
    )
    assert (folder / "corda-kpm" / "0.001-0" / "weights" / "adapter_model.safetensors").is_file()
    assert json.loads((folder / "corda-kpm" / "plan.json").read_text())["mode"] == "kpm"
    assert json.loads((folder / "preview" / "plan.json").read_text())["mode"] == "ipm"
    rows = read_rows(folder / "scores.jsonl")
    assert {row["method"] for row in rows} == {
        "base",
        "corda-kpm",
        "preview",
        "full",
        "linear-probe",
    }
    assert all(row["n"] > 0 and 0 <= row["value"] <= 1 for row in rows)
    score = {(row["method"], row["task"]): row["value"] for row in rows}
    assert score["linear-probe", "emoji"] == score["base", "emoji"], (
        "a probe changes nothing it knew"
    )
    assert score["linear-probe", "digits"] > score["base", "digits"] + 0.2, (
        "its head is what is judged"
    )
    printed = capsys.readouterr().out
    assert "corda-kpm" in printed
    assert "report.html" in printed
    facts = json.loads((folder / "run.json").read_text())
    assert facts["command"].startswith("corda-vlm run ")

    before = (folder / "scores.jsonl").read_bytes()
    run(config(), output=folder)
    assert (folder / "scores.jsonl").read_bytes() == before, "a second run measures nothing again"
    assert "4 of 4 trainings are finished already" in capsys.readouterr().out

    run(config(seeds=[0, 1]), output=folder, only=["full"])
    added = read_rows(folder / "scores.jsonl")[len(rows) :]
    assert {(row["method"], row["seed"]) for row in added} == {("full", 1)}, "a seed adds to it"

    logged = {**EXPERIMENT["training"], "log_every": 2}
    probe = {**EXPERIMENT["variants"]["linear-probe"], "scales": []}
    more = {
        "evaluation": {"scales": [0.5]},
        "training": logged,
        "variants": {**EXPERIMENT["variants"], "linear-probe": probe},
    }
    run(config(**more), output=folder, only=["full"])
    swept = [row for row in read_rows(folder / "scores.jsonl") if row["scale"] == 0.5]
    assert {(row["method"], row["seed"]) for row in swept} == {("full", 0)}, "so does a scale"

    with pytest.raises(CordaError, match=r"another experiment \(it differs in rank\).*--fresh"):
        run(config(rank=5), output=folder)
    with pytest.raises(UnknownNameError, match="variant 'dora'"):
        run(config(), output=folder, only=["dora"])


@pytest.mark.parametrize(
    "variant", [{"method": "corda-kpm"}, {"method": "lora", "anchor": 10}], ids=["kpm", "anchor"]
)
def test_a_variant_on_layers_without_a_covariance_is_refused_before_anything_is_written(
    variant, config, tmp_path
):
    changes = {
        "variants": {"mine": {**variant, "learning_rates": [1e-3]}},
        "calibration": {**EXPERIMENT["calibration"], "roles": ["q"]},
    }
    with pytest.raises(
        CordaError, match=r"'mine' adapts .*k_proj, and the covariances of the knowledge"
    ):
        run(config(**changes), output=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_methods_that_start_from_the_gradient_of_the_task(config, tmp_path, capsys):
    natural = {"method": "corda-natural", "learning_rates": [1e-3]}
    changes = {
        "variants": {"natural": natural, "damped": {**natural, "damping": 1e-2}},
        "training": {"steps": 2, "batch_size": 16},
        "gradient": {"batches": 2, "batch_size": 16},
    }
    folder = run(config(**changes), output=tmp_path / "out")
    (gradient,) = folder.glob("gradient-*.safetensors")  # of one loss there is one
    plan = json.loads((folder / "natural" / "plan.json").read_text())
    assert plan["task_fingerprint"] == GradientStore.load(gradient).data_fingerprint
    assert GradientStore.load(gradient).batches == 2
    adapter = folder / "natural" / "0.001-0" / "weights" / "adapter_config.json"
    assert json.loads(adapter.read_text())["peft_type"] == "LORA"
    capsys.readouterr()
    run(config(**changes), output=folder)
    assert "2 of 2 trainings are finished already" in capsys.readouterr().out
    smoothed = {**changes, "training": {**changes["training"], "label_smoothing": 0.1}}
    with pytest.raises(CordaError, match="another experiment"):
        run(config(**smoothed), output=folder)
    head = {"variants": {"natural": {**natural, "training": {"loss": "linear"}, "scales": []}}}
    with pytest.raises(CordaError, match="linear classifier starts at zero"):
        run(config(**head), output=tmp_path / "linear")


def test_variants_with_a_budget(config, tmp_path, capsys):
    calibration = {**EXPERIMENT["calibration"], "samples": 16}
    budget = {
        "method": "lora",
        "keep": 0.3,
        "keep_every": 1,
        "keep_metric": "agreement",
        "learning_rates": [1e-2],
    }
    val = {"source": EXPERIMENT["calibration"]["data"]["source"], "split": "val"}
    held_out, own = {**budget, "probe_records": 40}, {**budget, "keep_by": "strength", "probe": val}
    changes = {
        "variants": {"held-out": held_out, "own": own},
        "training": {"steps": 2, "batch_size": 16},
        "calibration": calibration,
    }
    folder = run(config(**changes), output=tmp_path / "out")
    told = {
        name: json.loads((folder / name / "0.01-0" / "result.json").read_text())["budget"]
        for name in ("held-out", "own")
    }
    assert told["held-out"]["kept"]["records"] == 40
    assert told["own"]["kept"]["records"] == 50
    assert (told["held-out"]["term"], told["own"]["term"]) == ("distill", None)
    assert all(one["kept"]["share"] >= 0.3 for one in told.values())
    strengths = {row["strength"] for row in read_rows(folder / "scores.jsonl") if "strength" in row}
    assert strengths == {one["strength"] for one in told.values()}
    capsys.readouterr()
    del changes["variants"]["own"]
    run(config(**changes), output=folder)
    assert "1 of 1 trainings are finished already" in capsys.readouterr().out
    few = {"variants": {"few": {**held_out, "keep": 0.95}}, "calibration": calibration}
    with pytest.raises(
        CordaError, match=r"'few': the probe's 40 records are too few.*it takes 228"
    ):
        run(config(**few), output=tmp_path / "few")
    assert not list((tmp_path / "few").glob("*.safetensors"))


def test_a_folder_from_before_an_option_existed_is_gone_on_with(config, tmp_path):
    experiment = load_experiment(config())
    path = tmp_path / "out" / "config.yaml"
    claim(path.parent, experiment, fresh=False)
    older = yaml.safe_load(path.read_text())
    del older["variants"]["full"]["min_rank"], older["forecast"]
    path.write_text(yaml.safe_dump(older))
    claim(path.parent, experiment, fresh=False)
    path.write_text(yaml.safe_dump(older))
    with pytest.raises(CordaError, match=r"differs in forecast\)"):
        claim(path.parent, replace(experiment, forecast=True), fresh=False)


def test_a_foreign_folder_is_left_alone(config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(CordaError, match="not empty and holds no run"):
            run(config(), output=tmp_path / "mine", fresh=fresh)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.unchecked
def test_killed_and_started_again_it_ends_as_if_nothing_had_happened(config, tmp_path):
    path = config(
        variants={"corda-kpm": {"a_norm": 10, "learning_rates": [1e-3, 2e-3]}},
        training={
            **EXPERIMENT["training"],
            "bf16": False,
        },  # else each process measures what is faster
        evaluation={"bf16": False},
    )
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run(path, output=whole)
    command = [sys.executable, "-m", "corda_vlm", "run", str(path), "--output", str(torn)]
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (torn / "corda-kpm" / "0.001-0" / "train.json").exists():
        assert victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not (torn / "report.md").exists(), "it was killed on the way"
    run(path, output=torn)

    def values(folder):
        return {
            (row["method"], row["learning_rate"], row["task"], row["metric"]): row["value"]
            for row in read_rows(folder / "scores.jsonl")
        }

    assert values(torn) == values(whole)


def test_a_folder_takes_no_results_of_what_has_changed_since(config, tmp_path):
    full, probe = ({name: EXPERIMENT["variants"][name]} for name in ("full", "linear-probe"))
    folder = run(config(variants=full), output=tmp_path / "out")
    run(config(variants=probe), output=folder)
    assert set(yaml.safe_load((folder / "config.yaml").read_text())["variants"]) == {*full, *probe}
    with pytest.raises(CordaError, match=r"differs in variants\.full\.rank"):
        run(config(variants={"full": {"learning_rates": [1e-4], "rank": 3}}), output=folder)

    path = config(variants=full)
    other = {**SUITE, "tasks": [SUITE["tasks"][0], {**SUITE["tasks"][1], "limit": 50}]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(CordaError, match=r"results of the suite's task 'emoji'.*--fresh"):
        run(path, output=folder)


def test_a_folder_takes_no_results_of_other_data_in_the_same_file(config, tmp_path):
    table = pq.read_table(asset("model_zoo/emoji-clip/data/twemoji.parquet"))
    kept, path = tmp_path / "kept.parquet", config(variants={"full": {"learning_rates": [1e-4]}})
    emoji = {**SUITE["tasks"][1], "data": {"source": f"parquet:{kept}", "label": "group"}}
    suite = {**SUITE, "tasks": [SUITE["tasks"][0], emoji]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    pq.write_table(table.slice(0, 60), kept)
    folder = run(path, output=tmp_path / "out")
    pq.write_table(table.slice(30, 60), kept)
    with pytest.raises(CordaError, match=r"results of the data of task 'emoji'.*--fresh"):
        run(path, output=folder)


def test_fresh_begins_anew(config, tmp_path):
    folder = tmp_path / "out"
    variants = {"full": {"learning_rates": [1e-4]}}
    run(config(variants=variants), output=folder)
    run(config(variants=variants, rank=5), output=folder, fresh=True)
    assert yaml.safe_load((folder / "config.yaml").read_text())["rank"] == 5
    shutil.rmtree(folder)


def test_a_training_that_diverges_stops_no_other_and_is_not_tried_again(config, tmp_path, capsys):
    variants = {
        "full": {"learning_rates": [1e-4, 1e30], "training": {"max_grad_norm": 0.0}},
        "linear-probe": {"learning_rates": [1e-1], "training": {"steps": 4}},
    }
    folder = run(config(variants=variants, calibration=None), output=tmp_path / "out")
    printed = capsys.readouterr().out
    assert "full, learning rate 1e+30, seed 0: diverged. the " in printed
    assert "Lower the peak learning rate" in printed
    rows = read_rows(folder / "scores.jsonl")
    assert {(row["method"], row["learning_rate"]) for row in rows} == {
        ("base", None), ("full", 1e-4), ("linear-probe", 1e-1),
    }  # fmt: skip
    assert all("gain_low" in row for row in rows if row["method"] != "base")
    table = [line.split() for line in printed.splitlines() if line.startswith("full ")]
    assert table[-1][-1] == "diverged"
    assert "| full | 1e+30 | – | – | diverged |" in (folder / "report.md").read_text()

    run(config(variants=variants, calibration=None), output=folder)
    assert "3 of 3 trainings are finished already, 1 of them diverged" in capsys.readouterr().out
