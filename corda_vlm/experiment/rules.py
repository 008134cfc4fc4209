"""What an experiment may not say: each check looks at one thing in its variants, and raises a `CordaError` that names it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from corda_vlm.adapter.options import check_scale
from corda_vlm.data.spec import parse_spec
from corda_vlm.errors import CordaError, UnknownNameError
from corda_vlm.evaluation.scores import BASE
from corda_vlm.methods import METHODS
from corda_vlm.names import check_name
from corda_vlm.run_files import PATTERNS

if TYPE_CHECKING:
    from corda_vlm.experiment.spec import Calibration, Experiment


def check_variants(experiment: Experiment) -> None:
    """There are variants, each can be, and none shares its folder with another.

    Raises:
        UnknownNameError: an unknown method, or an unknown option of a training.
        CordaError: anything else that cannot be.
    """
    if not experiment.variants:
        raise CordaError(f"experiment {experiment.name!r} has no variants: nothing to train")
    lowered: dict[str, str] = {}
    for name in experiment.variants:
        _check_name(name)
        _check_method(experiment, name)
        _check_calibration(experiment, name)
        _check_scales(experiment, name)
        _check_trainings(experiment, name)
        if (other := lowered.setdefault(name.casefold(), name)) != name:
            raise CordaError(
                f"the variants {other!r} and {name!r} would share a folder where file systems do not tell capital "
                "from small letters; rename one of them"
            )


def _check_name(name: str) -> None:
    if name == BASE:
        raise CordaError(f"a variant cannot be called {BASE!r}: that is the model before training")
    check_name(name, "a variant's name")
    if any(fnmatchcase(name.casefold(), pattern) for pattern in PATTERNS):
        raise CordaError(
            f"a variant cannot be called {name!r}: a run writes a file of that name beside its variants' folders"
        )


def _check_method(experiment: Experiment, name: str) -> None:
    variant = experiment.variants[name]
    method = METHODS.get(experiment.method_of(name))
    if method is None:
        raise UnknownNameError(f"method of variant {name!r}", experiment.method_of(name), METHODS)
    method.check_options(experiment.request(name))
    if variant.anchor and not method.changes_layers:
        raise CordaError(
            f"variant {name!r} changes no layer, so there is nothing to anchor; leave its anchor out"
        )
    if variant.keep is not None and not method.changes_layers:
        raise CordaError(
            f"variant {name!r} changes no layer, so that it forgets nothing and keep has nothing to hold; leave it out"
        )
    if (terms := variant.names) and not method.changes_layers:
        raise CordaError(
            f"variant {name!r} changes no layer, so that {terms[0]} has nothing to hold; leave it out"
        )


def _check_calibration(experiment: Experiment, name: str) -> None:
    variant, calibration = experiment.variants[name], experiment.calibration
    if calibration is None and (why := _needs_calibration(experiment, name)):
        raise CordaError(
            f"variant {name!r} {why}, and the experiment has no `calibration`; say there which data stands "
            "for the knowledge to keep"
        )
    try:
        terms = experiment.terms_of(name)
    except CordaError as error:
        raise CordaError(f"variant {name!r}: {error}") from None
    if terms.anchor and terms.anchor_output != "none" and calibration is not None:
        _check_output_side(name, terms.anchor_output, calibration)
    if variant.dynamic_covariance and calibration is not None and calibration.rounds < 2:
        raise CordaError(
            f"variant {name!r} chooses among calibration rounds, and there is one; give calibration.rounds, e.g. 4, "
            "or leave dynamic_covariance out"
        )


def _check_output_side(name: str, output_side: str, calibration: Calibration) -> None:
    if not calibration.output_side:
        raise CordaError(
            f"variant {name!r} has an anchor with the output side {output_side}, and the calibration does not collect one; say "
            "calibration: {output_side: true}, or leave anchor_output out"
        )


def _needs_calibration(experiment: Experiment, name: str) -> str | None:
    """Why a variant needs the knowledge; None if it needs none."""
    method = METHODS[experiment.method_of(name)]
    if method.needs_store:
        return f"is {method.name}, which takes its directions from data"
    if (variant := experiment.variants[name]).keep is not None and variant.probe is None:
        return "is to keep a share of what the model knew, which records of that knowledge tell"
    steers_anchor = variant.keep is not None and variant.keep_by == "anchor"
    if steers_anchor and variant.anchor_metric == "task":
        return "is to keep a share by an anchor, whose covariances are collected as those of the knowledge are"
    if variant.anchors_to("knowledge"):
        return "has an anchor to that knowledge"
    if terms := variant.needs_data:
        return f"has {terms[0]}, which looks at records of that knowledge"
    if variant.anchors_to("task"):
        return "has an anchor with covariances of the task, which are collected as those of the knowledge are"
    return "is to log a forecast of forgetting" if experiment.forecast else None


def _check_scales(experiment: Experiment, name: str) -> None:
    try:
        for scale in experiment.scales_of(name):
            check_scale(scale)
    except CordaError as error:
        raise CordaError(f"variant {name!r}: {error}") from None


def _check_trainings(experiment: Experiment, name: str) -> None:
    variant = experiment.variants[name]
    if not variant.learning_rates:
        raise CordaError(f"variant {name!r} has no learning rates")
    folders = [t.folder for t in experiment.trainings() if t.variant == name]
    if len(set(folders)) < len(folders):
        raise CordaError(
            f"variant {name!r}: learning rates that are equal to six digits would share a folder; "
            "give one of them"
        )
    kind = parse_spec(experiment.task.data).format
    options = [experiment.train_options(name, rate, 0) for rate in variant.learning_rates]
    (loss,) = {one.loss_for(kind) for one in options}
    _check_loss(name, loss, kind)
    try:
        if METHODS[experiment.method_of(name)].takes_gradient(experiment.request(name)):
            experiment.gradient_options(name)  # raises
        for one in options:
            variant.check_training(one, one.loss_for(kind))
    except CordaError as error:
        raise CordaError(f"variant {name!r}: {error}") from None
    if loss == "linear" and experiment.scales_of(name):
        raise CordaError(
            f"variant {name!r} trains a linear head, which has no counterpart in the base model to be scaled "
            "towards; give it `scales: []`"
        )
    if variant.modules_to_save and experiment.scales_of(name):
        raise CordaError(
            f"variant {name!r} trains modules whole, which cannot be scaled; give it `scales: []`"
        )


def _check_loss(variant: str, loss: str, kind: str | None) -> None:
    if kind is not None and loss != "next_token":
        raise CordaError(
            f"variant {variant!r} has the {loss} loss, and the task's data are conversations (format: {kind}); give "
            "training: {loss: next_token}"
        )
    if kind is None and loss == "next_token":
        raise CordaError(
            f"variant {variant!r} has the next_token loss; say which format: the task's data has, e.g. llava, chat, qa or alpaca"
        )
