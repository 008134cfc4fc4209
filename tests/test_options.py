"""Options are of their declared types and within their bounds, wherever they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import pytest

from corda_vlm.data import ChatOptions
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.experiment.spec import Calibration, Evaluation, Variant
from corda_vlm.methods import MethodRequest, get_method
from corda_vlm.names import check_name
from corda_vlm.options import (
    Count,
    Items,
    NotNegative,
    check_options,
    options_from,
    read_options,
)
from corda_vlm.plan.options import PlanOptions
from corda_vlm.train import TrainOptions


@dataclass(frozen=True)
class Inner:
    many: Count = 1


@dataclass(frozen=True)
class Options:
    name: str
    rate: NotNegative = 0.0
    kind: Literal["a", "b"] | None = None
    switch: bool | Literal["auto"] = "auto"
    list_of: Annotated[list[int], Items(least=1, distinct=True)] = field(
        default_factory=lambda: [1]
    )
    pair: tuple[float, float] = (0.0, 1.0)
    inner: dict[str, Inner] = field(default_factory=dict)
    words: Sequence[str] | str = ()
    anything: Any = None

    def __post_init__(self) -> None:
        check_options(self)


def test_a_mapping_becomes_options():
    read = read_options(
        Options,
        {
            "name": "x",
            "rate": 1,
            "kind": "b",
            "switch": True,
            "inner": {"y": {"many": 3}},
            "pair": [1, 2],
        },
        "x.yaml",
    )
    assert read == Options("x", 1.0, "b", True, [1], (1.0, 2.0), {"y": Inner(3)})
    assert isinstance(read.rate, float)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"nmae": 1}, "unknown option in x.yaml 'nmae'.*Did you mean 'name'"),
        ({"name": 3}, r"x\.yaml: name cannot be 3; it must be text \(text goes in quotes\)"),
        ({"rate": True}, "rate cannot be True; it must be a finite number at least 0"),
        ({"rate": math.nan}, "rate cannot be nan"),
        ({"rate": math.inf}, "rate cannot be inf"),
        ({"rate": 10**400}, "rate cannot be 1000"),
        ({"rate": -1}, r"x\.yaml: rate is -1.0; it must be at least 0"),
        ({"kind": "c"}, "unknown kind 'c'; choose one of: a, b"),
        ({"kind": ["a"]}, r"kind cannot be \['a'\]; it must be 'a' or 'b' or null"),
        ({"switch": "maybe"}, "switch cannot be 'maybe'; it must be true or false or 'auto'"),
        ({"switch": 1}, "switch cannot be 1"),
        ({"list_of": []}, "needs at least 1"),
        ({"list_of": [1, 2, 1]}, "list_of holds 1 twice"),
        ({"list_of": [1, 2.5]}, r"list_of\[1\] cannot be 2.5; it must be a whole number"),
        ({"list_of": "12"}, "list_of cannot be '12'; it must be a list"),
        ({"pair": [1]}, "pair cannot be"),
        ({"inner": {"y": {"many": 0}}}, r"inner\.y\.many is 0; it must be at least 1"),
        ({"inner": {"y": {"mny": 1}}}, r"'inner\.y\.mny'.*Did you mean 'inner\.y\.many'"),
        ({"inner": {"y": 3}}, r"inner\.y cannot be 3; it must be a mapping"),
        ({"inner": {1: {}}}, "inner cannot be"),
        ({"words": [1]}, r"words\[0\] cannot be 1"),
    ],
)  # fmt: skip
def test_what_is_refused(changes, told):
    with pytest.raises(CordaError, match=told):
        read_options(Options, {"name": "x", **changes}, "x.yaml")


def test_what_is_missing():
    with pytest.raises(CordaError, match=r"x\.yaml: no name; it has to be given"):
        read_options(Options, {}, "x.yaml")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TrainOptions, {"weight_decay": -0.1}),
        (TrainOptions, {"betas": (0.9, 1.0)}),
        (TrainOptions, {"betas": (0.9,)}),
        (TrainOptions, {"max_grad_norm": -1.0}),
        (TrainOptions, {"batch_size": 0}),
        (TrainOptions, {"batch_size": True}),
        (TrainOptions, {"batch_size": 1.5}),
        (TrainOptions, {"learning_rate": math.nan}),
        (TrainOptions, {"learning_rate": math.inf}),
        (TrainOptions, {"seed": -1}),
        (TrainOptions, {"seed": 2**40}),
        (TrainOptions, {"workers": -1}),
        (TrainOptions, {"cache_mb": -1.0}),
        (TrainOptions, {"learn": "some"}),
        (TrainOptions, {"max_tokens": 1}),
        (TrainOptions, {"loss": "mse"}),
        (ChatOptions, {"too_long": "cut"}),
        (ChatOptions, {"max_tokens": True}),
        (Calibration, {"samples": 0}),
        (Calibration, {"batch_size": 0}),
        (Calibration, {"rounds": 0}),
        (Calibration, {"precision": "float8"}),
        (Calibration, {"data": "nothing:x"}),
        (Evaluation, {"batch_size": 0}),
        (Evaluation, {"scales": [0.5, 0.5]}),
        (Variant, {"rank": 0}),
        (Variant, {"learning_rates": [1e-3, 1e-3]}),
        (Variant, {"learning_rates": [1e-3, 0]}),
        (Variant, {"learning_rates": [1e-3, -1.0]}),
        (Variant, {"a_norm": 0.0}),
        (Variant, {"damping": -1e-4}),
        (Variant, {"beta": 1.5}),
        (Variant, {"side": "inptu"}),
        (Variant, {"anchor": -1.0}),
        (Variant, {"min_rank": 0}),
        (Variant, {"modules_to_save": ["a", "a"]}),
    ],
)
def test_the_library_is_told_the_same_as_yaml(kind, options):
    needed = {
        TrainOptions: {"steps": 3},
        Calibration: {"data": "sklearn:digits"},
        Variant: {"learning_rates": [1e-3]},
    }.get(kind, {})
    kind(**needed)
    with pytest.raises(CordaError):
        kind(**{**needed, **options})
    with pytest.raises(CordaError):
        read_options(kind, {**needed, **options}, "x.yaml")


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"a_norm": -1.0}, {"damping": math.nan}, {"seed": -1}, {"towers": ["a", "a"]}]
)  # fmt: skip
def test_a_method_is_asked_for_what_can_be(options):
    with pytest.raises(CordaError):
        get_method("corda-kpm").check_options(MethodRequest(**options))


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a.", " a", "a\nb", "a\0b", "\u202egpj", "x" * 101,
        "é" * 101, "\U0001f600" * 60, "NUL", "con.txt", "\ud800", 3, None, ["a"],
    ],
)  # fmt: skip
def test_names_that_are_none(name):
    with pytest.raises(CordaError, match="the name"):
        check_name(name, "the name")


@pytest.mark.parametrize(
    "name", ["demo", "corda-kpm", "ViT-B 32", "a_norm=10", "日本語", "$x$", "1"]
)
def test_names_that_are(name):
    assert check_name(name, "the name") == name


def test_of_thousands_of_choices_a_few_are_shown():
    error = UnknownNameError("class", "clazz-77", [f"class-{n}" for n in range(5000)])
    assert "and 4,940 more" in str(error)
    assert "Did you mean 'class-77'" in str(error)
    assert len(str(UnknownNameError("name", "x" * 10**6, ["y"]))) < 2000


def test_numbers_of_numpy_are_taken_as_keywords():
    import numpy as np

    options = options_from(PlanOptions, {"rank": np.int64(8), "damping": np.float32(0.5)}, "plan")
    assert (options.rank, options.damping) == (8, 0.5)
    assert (type(options.rank), type(options.damping)) == (int, float)
    with pytest.raises(UnknownNameError, match=r"option of plan 'ranks'.*Did you mean 'rank'"):
        options_from(PlanOptions, {"ranks": 8}, "plan")


def test_a_training_left_open_is_three_epochs_of_the_loss_that_the_data_mean():
    assert replace(TrainOptions(), steps=5).steps == 5, "nothing is filled in before it is asked"
    assert (TrainOptions().complete(None).loss, TrainOptions().complete("qa").loss) == ("prompt", "next_token")  # fmt: skip
    assert TrainOptions().complete(None).epochs == 3
    assert TrainOptions(steps=5).complete(None).epochs is None


def test_a_former_name_is_taken_and_said(caplog):
    read = read_options(TrainOptions, {"template": "plain", "steps": 1}, "former.yaml")
    assert read.chat_template == "plain"
    assert "template is now called chat_template" in caplog.text
    with pytest.raises(CordaError, match="chat_template is given twice"):
        read_options(TrainOptions, {"template": "a", "chat_template": "b"}, "former.yaml")
