"""The steps that verbs and runs share: the same data and options give the same files, however they are asked for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from corda_vlm.__main__ import main
from corda_vlm.covariance import CovarianceStore, GradientStore
from corda_vlm.covariance.options import CalibrationOptions
from corda_vlm.errors import DataError, ForeignFileError, NotFiniteError, UnknownNameError
from corda_vlm.evaluation import Cache, done, load_suite, read_rows
from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.experiment import steps
from corda_vlm.experiment.load import parse_experiment
from corda_vlm.families import load_model
from corda_vlm.methods import prepare_method
from corda_vlm.plan import plan_adapter
from corda_vlm.train import TrainOptions
from corda_vlm.train.terms.options import TermOptions
from corda_vlm.train.trained import Trained

NOTO = {
    "source": "parquet:model_zoo/emoji-clip/data/noto.parquet",
    "split": "train",
    "label": "group",
    "text": "a picture of {class_name}",
    "limit": 12,
}
FEW = CalibrationOptions(samples=8, batch_size=8)
SOME = {"towers": ["vision"], "roles": ["o"]}
DIGITS = {"source": "sklearn:digits", "split": "train", "limit": 16}
SUITE = {
    "name": "small",
    "version": 1,
    "tasks": [
        {"name": name, "role": role, "kind": "zero_shot", "limit": 20, "data": "sklearn:digits",
         "classes": {"from": "data"}, "templates": ["{}"]}
        for name, role in (("digits", "gain"), ("again", "retention"))
    ],
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")


@pytest.fixture
def loaded():
    return load_model("emoji-clip")


def test_the_towers_are_part_of_what_identifies_the_batches(loaded, tmp_path):
    data = steps.load_data(NOTO)

    def fingerprint(towers):
        path = tmp_path / f"{towers}.safetensors"
        options = replace(FEW, towers=towers, roles=["o"])
        return steps.calibrate(loaded, data, path, options).data_fingerprint

    both = fingerprint(None)
    assert fingerprint("vision") == fingerprint(["vision"]) != both
    assert fingerprint("vision,text") == fingerprint(["vision", "text"]) == both


def test_the_verb_and_a_run_calibrate_on_the_same(loaded, tmp_path, monkeypatch):
    """Of data with pictures and texts, of which the adapted tower takes the pictures alone."""
    config = {
        "name": "same", "model": "emoji-clip", "suite": "emoji-digits", "towers": ["vision"],
        "task": {"data": "sklearn:digits"}, "variants": {"corda-kpm": {"learning_rates": [1e-3]}},
        "calibration": {"data": NOTO, "samples": 8, "batch_size": 8, "roles": ["o"]},
    }  # fmt: skip
    options = parse_experiment(config, "same.yaml").calibration_options("knowledge")
    of_run = steps.calibrate(loaded, steps.load_data(NOTO), tmp_path / "run.safetensors", options)
    words = ["--samples=8", "--batch-size=8", "--towers=vision", "--roles=o"]
    path = str(tmp_path / "verb.safetensors")
    main(["calibrate", "emoji-clip", json.dumps(NOTO), "--output", path, *words])
    of_verb = CovarianceStore.load(path)
    assert of_verb.data_fingerprint == of_run.data_fingerprint
    assert [*of_verb] == [*of_run]
    for name in of_run:
        assert torch.equal(of_verb[name].matrix, of_run[name].matrix)


def test_an_unknown_tower_is_told_with_the_models_own(loaded, tmp_path):
    def calibrate(data, towers):
        options = replace(FEW, towers=towers)
        return steps.calibrate(loaded, steps.load_data(data), tmp_path / "c", options)

    with pytest.raises(UnknownNameError, match="unknown tower 'visoin'"):
        calibrate(NOTO, ["visoin"])
    with pytest.raises(DataError, match="no texts for the text tower"):
        calibrate(DIGITS, ["text"])


def test_a_plan_is_made_once_and_refused_where_the_covariances_are_others(loaded, tmp_path):
    def calibrated(name, seed):
        data = steps.load_data(NOTO)
        return steps.calibrate(loaded, data, tmp_path / name, replace(FEW, **SOME, seed=seed))

    store, other = calibrated("one", 0), calibrated("other", 1)
    made = []

    def make():
        made.append(1)
        return plan_adapter(loaded.model, store, rank=2, **SOME)

    path, given = tmp_path / "plan.json", {"model": loaded.model, "task": None}
    first = steps.load_or_write_plan(path, make, store=store, **given)
    again = steps.load_or_write_plan(path, make, store=store, **given)
    assert again.data_fingerprint == first.data_fingerprint == store.data_fingerprint
    assert len(made) == 1
    with pytest.raises(ForeignFileError, match=r"plan\.json was made from other covariances"):
        steps.load_or_write_plan(path, make, store=other, **given)
    assert steps.load_or_write_plan(path, make, store=None, **given) is not None, "of a plan alone"


def test_a_plan_whose_ranks_looked_at_no_task_goes_on_where_they_now_would(loaded, tmp_path):
    """That of a former version, with `dynamic_rank`."""
    store = steps.calibrate(loaded, steps.load_data(NOTO), tmp_path / "c", replace(FEW, **SOME))
    options = {"rank": 2, **SOME, "dynamic_rank": True, "rank_rule": "compactness"}
    plan = plan_adapter(loaded.model, store, **options)
    path = tmp_path / "plan.json"
    task = GradientStore({}, model_fingerprint="m", data_fingerprint="t", batches=1)
    given = {"model": loaded.model, "store": store, "task": task}
    for rule in ("compactness", None):
        replace(plan, rank_rule=rule).save(path)
        if rule is None:
            assert steps.load_or_write_plan(path, lambda: plan, **given).rank_rule is None
        else:
            with pytest.raises(ForeignFileError, match="another gradient"):
                steps.load_or_write_plan(path, lambda: plan, **given)


def test_class_names_come_in_the_order_of_the_datas_labels(tmp_path):
    data = steps.load_data(DIGITS)
    own = list(map(str, data.class_names))
    assert steps.training_prompts(data, None, None) == (None, None)
    names, templates = steps.training_prompts(data, own[::-1], ["a {}."])
    assert list(names) == own
    assert list(templates) == ["a {}."]
    (tmp_path / "names.yaml").write_text(json.dumps({name: f"the {name}" for name in own}))
    named, _ = steps.training_prompts(data, "names.yaml", None, beside=tmp_path / "x.yaml")
    assert list(named) == [f"the {name}" for name in own]
    with pytest.raises(DataError, match="10 classes"):
        steps.training_prompts(data, ["zero"], None)


def test_the_verb_takes_files_of_class_names_and_templates_as_a_run_does(
    loaded, tmp_path, monkeypatch
):
    data = steps.load_data(NOTO)
    store = steps.calibrate(loaded, data, tmp_path / "c", replace(FEW, **SOME))
    plan_adapter(loaded.model, store, rank=2, **SOME).save(tmp_path / "plan.json")
    own = list(map(str, steps.load_data(DIGITS).class_names))
    given = {}

    def train(*_args, **options):
        given.update(options)
        raise NotFiniteError("seen enough")

    monkeypatch.setattr(steps, "train_anchored", train)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.yaml").write_text(json.dumps({name: f"the {name}" for name in own}))
    words = ["train", "emoji-clip", json.dumps(DIGITS)]
    one = ["--classes", "names.yaml", "--templates", "digits"]
    many = [*(word for name in own[::-1] for word in ("--classes", name)), "--templates", "a {}."]
    with pytest.raises(SystemExit):
        main([*words, *one])
    assert list(given["classes"]) == [f"the {name}" for name in own]
    assert given["templates"] == ("the digit {}", "a drawing of the number {}", "the number {}")
    with pytest.raises(SystemExit):
        main([*words, *many])
    assert list(given["classes"]) == own, "in the order of the data's labels, as of a run"
    assert given["templates"] == ("a {}.",)


def trained_by(loaded, output):
    """A plan trained for two steps, with an anchor that is logged alone."""
    from corda_vlm.adapter import attach_adapter

    data = steps.load_data(NOTO)
    store = steps.calibrate(loaded, data, output / "c", replace(FEW, **SOME))
    model = attach_adapter(loaded.model, plan_adapter(loaded.model, store, rank=2, **SOME))
    options = TrainOptions(steps=2, batch_size=8, learning_rate=1e-3)
    result, predicted = steps.train_anchored(
        model,
        steps.load_data(DIGITS),
        loaded.processor,
        options=options,
        output_dir=output / "adapter",
        classes=None,
        templates=["{}"],
        knowledge=store,
        terms=TermOptions(),
    )
    return model, result, predicted


def test_an_anchor_of_another_metric_is_a_term_beside_the_forecast(loaded, tmp_path):
    """The forecast stays the relative change of outputs on the knowledge, so that trainings compare."""
    data, felt = steps.load_data(NOTO), replace(FEW, **SOME, output_side=True)
    store = steps.calibrate(loaded, data, tmp_path / "c", felt)
    model = prepare_method("lora", loaded.model, rank=2, **SOME)
    result, predicted = steps.train_anchored(
        model,
        steps.load_data(DIGITS),
        loaded.processor,
        options=TrainOptions(steps=2, batch_size=8, learning_rate=1e-3, log_every=1),
        output_dir=tmp_path / "adapter",
        classes=None,
        templates=["{}"],
        knowledge=store,
        terms=TermOptions(anchor=30.0, anchor_output="kfac"),
    )
    assert {"anchor", "anchor_kfac"} <= result.history[-1].keys()
    assert predicted.keys() == {"forecast"}
    assert predicted["forecast"] == pytest.approx(anchor_of(model, store), rel=1e-3)
    plan = json.loads((tmp_path / "adapter" / "train.json").read_text())
    assert plan["terms"].keys() == {"anchor_kfac"}
    assert plan["terms"]["anchor_kfac"]["output_side"] == "kfac"


def anchor_of(model, store):
    """What `lora` changed, which begins at zero: the mean of `‖ΔW C^½‖² / ‖W C^½‖²`."""
    shares = []
    for name in store:
        layer, C = model.get_base_model().get_submodule(name), store[name].matrix.float()
        change = layer.get_delta_weight("default").detach()
        weight = layer.get_base_layer().weight.detach()
        shares.append(float(((change @ C) * change).sum() / ((weight @ C) * weight).sum()))
    return sum(shares) / len(shares)


@pytest.mark.unchecked  # what stands for model and covariances is neither
def test_a_forecast_that_is_no_number_is_a_divergence(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "train", lambda *_, **__: None)
    given = {"options": None, "output_dir": tmp_path, "classes": None, "templates": None}

    def forecast(value):
        anchor = lambda *_: lambda: torch.tensor(value)  # noqa: E731
        monkeypatch.setattr(steps, "anchor_penalty", anchor)
        return steps.train_anchored(None, None, None, **given, knowledge=1, terms=TermOptions())[1]

    assert forecast(0.5) == {"forecast": 0.5}
    assert (
        steps.train_anchored(None, None, None, **given, knowledge=None, terms=TermOptions())[1]
        == {}
    )
    with pytest.raises(NotFiniteError, match="forecast of forgetting is nan"):
        forecast(float("nan"))


def test_what_was_trained_is_measured_once(loaded, tmp_path):
    suite, scores = load_suite(SUITE), tmp_path / "scores.jsonl"
    model, result, predicted = trained_by(loaded, tmp_path)
    assert result.steps == 2
    assert predicted["forecast"] > 0
    about = {"run": "small", "method": "lora", "seed": 0}
    given = {"about": about, "processor": loaded.processor, "cache": Cache()}

    def measured(path, scale, tasks):
        options = EvalOptions(tasks=tasks, batch_size=10, bf16=False)
        return list(steps.measure_into(path, Trained(model), suite, options, scale=scale, **given))

    assert [added for _, added in measured(None, 1.0, ["digits"])] == [[]]
    assert not scores.exists()
    ((result, added),) = measured(scores, 0.5, ["digits"])
    assert result.task.name == "digits"
    assert [(row["method"], row["scale"]) for row in added] == [("lora", 0.5)]
    assert [added for _, added in measured(scores, 0.5, ["digits"])] == [[]], "it is there already"

    left = suite.remaining(done(read_rows(scores), method="lora", seed=0, scale=0.5))
    assert left == ["again"]
