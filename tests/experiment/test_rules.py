"""What the variants of an experiment may not say, each rule by an experiment that breaks it alone."""

from __future__ import annotations

import pytest

from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.experiment.load import parse_experiment


def experiment(variants, **more):
    """The smallest experiment that can be, with these variants."""
    content = {
        "name": "small",
        "model": "emoji-clip",
        "task": {"data": "sklearn:digits"},
        "suite": "emoji-digits",
        "variants": variants,
        **more,
    }
    return parse_experiment(content, "small.yaml")


def lora(**more):
    return {"method": "lora", "learning_rates": [1e-3], **more}


CALIBRATION = {"calibration": {"data": "sklearn:digits"}}
MANY = {"calibration": {"data": "sklearn:digits", "rounds": 2}}


def test_what_keeps_to_the_rules_is_taken():
    corda = {"method": "corda-kpm", "learning_rates": [1e-3, 2e-3], "anchor": 1}
    two = experiment({"lora": lora(), "corda": corda}, **CALIBRATION)
    assert [training.folder for training in two.trainings()] == [
        "lora/0.001-0",
        "corda/0.001-0",
        "corda/0.002-0",
    ]
    assert experiment({"lora": lora(), "full": {"learning_rates": [1e-5]}}).forecast is False


@pytest.mark.parametrize(
    ("variants", "more", "message"),
    [
        ({"lora": lora(learning_rates=[1e-3, 1.0000001e-3])}, {}, "equal to six digits would sha"),
        ({"corda-kpm": {"learning_rates": [1e-3]}}, {}, "is corda-kpm, which takes its directions"),
        ({"lora": lora(anchor=1)}, {}, "'lora' has an anchor to that knowledge, and the experimen"),
        ({"lora": lora(anchor=1, anchor_metric="task")}, {}, "has an anchor with covariances of the task"),
        (
            {"lora": lora(anchor=1, anchor_output="kfac")},
            {"calibration": {"data": "sklearn:digits"}},
            r"'lora' has an anchor with the output side kfac.*calibration: \{output_side: true\}",
        ),
        ({"lora": lora()}, {"forecast": True}, "'lora' is to log a forecast of forgetting"),
        ({"lora": lora(scales=[2.5])}, {}, "'lora': scale 2.5 is not between 0"),
        ({"lora": lora()}, {"evaluation": {"scales": [-1]}}, "'lora': scale -1 is not between 0"),
        ({"a/b": lora()}, {}, "a variant's name cannot be 'a/b'"),
        ({"lora": lora(), "LORA": lora()}, {}, "'lora' and 'LORA' would share a folder"),
        (
            {"lora": lora(modules_to_save=["head"], scales=[0.5])},
            {},
            "trains modules whole, which cannot be scaled",
        ),
        (
            {"lora": lora()},
            {"task": {"data": {"source": "sklearn:digits", "format": "qa"}},
             "training": {"loss": "contrastive"}},
            r"contrastive loss, and the task's data are conversations \(format: qa\)",
        ),
        (
            {"corda-natural": {"learning_rates": [1e-3], "dynamic_rank": True, "rank_rule": "energy"}},
            CALIBRATION,
            "rank rule 'energy' weighs components of the weight, and method 'corda-natural'",
        ),
        (
            {"corda-kpm": {"learning_rates": [1e-3], "rank_rule": "energy"}},
            CALIBRATION,
            "rank_rule=energy given without dynamic_rank",
        ),
        (
            {"corda-kpm": {"learning_rates": [1e-3], "dynamic_rank": True, "rank_rule": "enrgy"}},
            CALIBRATION,
            "unknown rank rule 'enrgy'.*Did you mean 'energy'",
        ),
        (
            {"corda-kpm": {"learning_rates": [1e-3], "dynamic_covariance": True}},
            CALIBRATION,
            "chooses among calibration rounds, and there is one",
        ),
    ],
)  # fmt: skip
def test_a_variant_that_breaks_a_rule_is_named_with_the_reason(variants, more, message):
    with pytest.raises(CordaError, match=message):
        experiment(variants, **more)


def test_a_rule_that_is_kept_another_way_is_no_reason():
    """What the messages advise is taken."""
    experiment({"lora": lora(anchor=1)}, **CALIBRATION)
    experiment({"lora": lora()}, forecast=True, **CALIBRATION)
    experiment({"lora": lora(modules_to_save=["head"], scales=[])}, evaluation={"scales": [0.5]})
    experiment({"corda-kpm": {"learning_rates": [1e-3], "dynamic_covariance": True}}, **MANY)
    asked = {"data": {"source": "sklearn:digits", "format": "qa"}}
    experiment({"lora": lora()}, task=asked, training={"loss": "next_token"})


def test_a_method_is_the_variants_name_unless_it_says_another():
    assert experiment({"lora": {"learning_rates": [1e-3]}}).method_of("lora") == "lora"
    with pytest.raises(UnknownNameError, match="method of variant 'mine' 'mine'"):
        experiment({"mine": {"learning_rates": [1e-3]}})
