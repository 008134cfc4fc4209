"""Every option is written once: it has help and one default, and is reached from Python, the command line and YAML."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from typing import Any, get_type_hints

import pytest

from corda_vlm.__main__ import VERBS
from corda_vlm.adapter.one_call import AdaptKeywords
from corda_vlm.adapter.options import AttachKeywords, AttachOptions
from corda_vlm.anchor.options import AnchorOptions
from corda_vlm.command_line import Command
from corda_vlm.covariance.options import CalibrationOptions, CollectKeywords, CollectOptions
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.evaluation.options import EvalKeywords, EvalOptions
from corda_vlm.experiment.spec import Calibration, Evaluation, Experiment, Variant
from corda_vlm.families.options import LoadKeywords, LoadOptions, SiteKeywords, SiteOptions
from corda_vlm.methods.options import MethodKeywords, MethodOptions
from corda_vlm.options import fitted, help_of, option_names
from corda_vlm.plan.options import (
    DecompositionKeywords,
    DecompositionOptions,
    PlanKeywords,
    PlanOptions,
)
from corda_vlm.train.options import (
    GradientOptions,
    LossOptions,
    TrainOptions,
)
from corda_vlm.train.terms.options import TermOptions

STAGES = {
    LoadOptions: LoadKeywords,
    SiteOptions: SiteKeywords,
    CollectOptions: CollectKeywords,
    DecompositionOptions: DecompositionKeywords,
    PlanOptions: PlanKeywords,
    AttachOptions: AttachKeywords,
    MethodOptions: MethodKeywords,
    EvalOptions: EvalKeywords,
}
"""Classes that a function takes as keywords, and what types those keywords."""

TAKEN_WHOLE = (
    ChatOptions,
    CalibrationOptions,
    LossOptions,
    GradientOptions,
    TrainOptions,
    AnchorOptions,
    TermOptions,
)
"""Classes that Python code makes itself."""

CLASSES = (*STAGES, *TAKEN_WHOLE)

IN_YAML = {
    LoadOptions: (Experiment,),
    ChatOptions: (Calibration,),
    SiteOptions: (Calibration, Variant),
    CollectOptions: (Calibration,),
    CalibrationOptions: (Calibration,),
    DecompositionOptions: (Variant,),
    PlanOptions: (Variant,),
    AttachOptions: (Variant,),
    MethodOptions: (Variant,),
    AnchorOptions: (Variant,),
    TermOptions: (Variant,),
    LossOptions: (TrainOptions,),
    GradientOptions: (GradientOptions,),  # so is `gradient`
    TrainOptions: (TrainOptions,),  # `training` is read as one
    EvalOptions: (Evaluation,),
}

ELSEWHERE = {
    (Variant, "seed"): "each variant is trained with the experiment's seeds",
    (Variant, "quantize_to"): "a run has no original weights where its model is quantised",
    (Variant, "mode"): "the name of the method has it: corda-kpm, corda-ipm",
}

OPTIONS = [(kind, field.name) for kind in CLASSES for field in dataclasses.fields(kind)]
names = pytest.mark.parametrize(
    ("kind", "name"), OPTIONS, ids=[f"{k.__name__}.{n}" for k, n in OPTIONS]
)


@names
def test_an_option_has_help(kind, name):
    text = help_of(kind).get(name, "")
    assert text.strip().endswith((".", ":", ")")), f"{name}: {text!r} is no whole sentence"
    assert text[:1].isupper() or not text[:1].isalpha(), f"{name}: {text!r} begins small"


@names
def test_an_option_has_one_default_of_its_own_type(kind, name):
    (field,) = (one for one in dataclasses.fields(kind) if one.name == name)
    assert field.default is not dataclasses.MISSING
    fitted(field.default, get_type_hints(kind, include_extras=True)[name], name)
    declared = [parent for parent in kind.__mro__ if name in inspect.get_annotations(parent)]
    assert len(declared) == 1, f"{name} is declared in {declared}"


def test_no_class_declares_an_option_of_another():
    homes: dict[tuple[str, str], set[type]] = {}
    for kind in CLASSES:
        for parent in kind.__mro__:
            for name in inspect.get_annotations(parent):
                if name != "FORMER":
                    homes.setdefault((name, help_of(parent).get(name, "")), set()).add(parent)
    twice = {name: kinds for (name, _), kinds in homes.items() if len(kinds) > 1}
    assert not twice, "the same option with the same help stands in several classes"


@names
def test_the_command_line_has_an_option(kind, name):
    verbs = [Command(verb, function) for verb, function in VERBS.items() if verb != "init"]
    having = [
        verb
        for verb in verbs
        if f"--{name.replace('_', '-')}" in {one.shown for one in verb.arguments}
    ]
    if kind is MethodOptions and name == "rho":  # eva has no plan, so that no verb makes one
        assert not having
        return
    assert having
    for verb in having:
        assert f"--{name.replace('_', '-')}" in verb.help()


@names
def test_yaml_has_an_option(kind, name):
    for spec in IN_YAML[kind]:
        if (spec, name) in ELSEWHERE:
            assert name not in option_names(spec)
        else:
            assert name in option_names(spec)


@pytest.mark.parametrize("kind", STAGES, ids=lambda kind: kind.__name__)
def test_the_library_takes_an_option_as_a_keyword(kind):
    assert set(STAGES[kind].__annotations__) | _inherited(STAGES[kind]) == set(option_names(kind))


def test_adapt_takes_what_its_three_steps_take():
    every = {
        *option_names(CollectOptions),
        *option_names(PlanOptions),
        *option_names(AttachOptions),
    }
    assert _inherited(AdaptKeywords) == every


def _inherited(keywords: Any) -> set[str]:
    return set(keywords.__optional_keys__) | set(keywords.__required_keys__)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [(Calibration, CalibrationOptions), (Evaluation, EvalOptions), (Variant, MethodOptions), (Experiment, LoadOptions)],
)  # fmt: skip
def test_a_spec_has_no_defaults_of_its_own(spec, kind):
    for field in dataclasses.fields(spec):
        if field.name in option_names(kind) and field.default is not None:
            assert field.default == getattr(kind, field.name), field.name


def test_options_are_read_before_pytorch_is_imported():
    modules = sorted({kind.__module__ for kind in (*CLASSES, Experiment)})
    code = f"import sys, {', '.join(modules)}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_begins_with_an_example(verb):
    if verb != "init":
        assert Command(verb, VERBS[verb]).help().startswith(f"example: corda-vlm {verb} ")
