"""How the results in a run's folder came about: what they were made from, in which precision, and on which machine."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from corda_vlm.errors import CordaError, ForeignFileError
from corda_vlm.evaluation.suite import Suite
from corda_vlm.experiment.load import load_former
from corda_vlm.experiment.spec import Experiment, Training
from corda_vlm.files import read_json, write_json
from corda_vlm.precision import Bf16, takes_bf16
from corda_vlm.run_files import BEGUN, CONFIG, DESCRIPTION, MADE_FROM
from corda_vlm.train.options import TrainOptions

if TYPE_CHECKING:
    from torch import nn

AUTOCAST = "bfloat16 (autocast)"
"""What a description calls that precision; any other is that of the weights."""

TRAINED_IN, MEASURED_IN = "trained in", "measured in"
"""The facts of a description that tell the precision of its trainings and of its scores."""


# ------------------------------------------------------------------ sources


KNOWLEDGE_DATA = "the knowledge's data"
"""A name of a source: the records that a term of a loss looks at."""


PROBE = "the probe of "
"""Names of sources begin so, with a variant behind it: the records that tell whether it keeps its budget."""


def check_sources(folder: Path, sources: Mapping[str, str]) -> None:
    """Refuse to add to scores of another model, other training data or other tasks under the same names.

    Args:
        sources: name -> fingerprint of what results would now be made from.

    Raises:
        CordaError: one of them has changed since the folder's results were made.
    """
    path = folder / MADE_FROM
    former = read_json(path, "list of sources") if path.is_file() else {}
    if not isinstance(former, dict):
        raise ForeignFileError(f"{path} is no list of sources; give another folder, or --fresh")
    # a task that is new to the suite is measured on all models, finished ones included
    changed = [
        name
        for name, digest in former.items()
        # of the knowledge, or of a probe, nothing is noted any more where no variant looks at its records
        if sources.get(name) != digest and (name in sources or not _of_variants(name))
    ]
    if changed:
        raise CordaError(
            f"{folder} holds results of {', '.join(changed)} as it was before; it has changed since. Give "
            "another folder with --output, or --fresh to delete them and begin anew"
        )


def _of_variants(name: str) -> bool:
    """Is a source there only for those who look at it?"""
    return name == KNOWLEDGE_DATA or name.startswith(PROBE)


# ------------------------------------------------------------------ precision


def settle_precisions(experiment: Experiment, folder: Path, model: nn.Module) -> dict[str, bool]:
    """Whether to train and to measure under bfloat16: fact of the description -> yes or no.

    Where the config leaves it open a folder goes on as it began, on whatever machine.
    """
    weight = next(model.parameters())
    begun = _begun(folder)

    def settled(fact: str, wanted: Bf16) -> bool:
        before = begun.get(fact, "auto")
        former = None if before == "auto" else before
        return takes_bf16(wanted, weight.device, former=former, weights=weight.dtype)

    return {fact: settled(fact, wanted) for fact, wanted in _wanted(experiment).items()}


def options_of(
    training: Training, experiment: Experiment, folder: Path, precisions: Mapping[str, bool]
) -> TrainOptions:
    """A training's options, with the precision that the run's folder began with.

    A training that has begun knows its own, so that there it is left open.
    """
    options = experiment.train_options(training.variant, training.learning_rate, training.seed)
    if options.bf16 != "auto" or (folder / training.folder / BEGUN).is_file():
        return options
    own = _variant_trained_in(training.variant)
    return replace(options, bf16=precisions.get(own, precisions[TRAINED_IN]))


def _begun(folder: Path) -> dict[str, Bf16]:
    """In which precision the folder's results were made, fact by fact; "auto" where nothing says."""
    path = folder / DESCRIPTION
    content = read_json(path, "description of a run") if path.is_file() else None
    description = content if isinstance(content, dict) else {}
    # before there was auto, what a config left out was false, and no description named a precision
    left_out: Bf16 = False if description and MEASURED_IN not in description else "auto"
    begun = _wanted(load_former((folder / CONFIG).resolve()), left_out)
    return begun | {f: description[f] == AUTOCAST for f in begun if f in description}


def _wanted(experiment: Experiment, left_out: Bf16 = "auto") -> dict[str, Bf16]:
    """What a config says of precision; variants that say nothing of their own are trained as the experiment says."""
    variants: dict[str, Bf16] = {
        _variant_trained_in(name): variant.training["bf16"]
        for name, variant in experiment.variants.items()
        if "bf16" in variant.training
    }
    return {
        TRAINED_IN: experiment.training.get("bf16", left_out),
        MEASURED_IN: experiment.evaluation.bf16,
        **variants,
    }


def _variant_trained_in(variant: str) -> str:
    """The fact that tells the precision of a variant that chooses its own."""
    return f"{variant} {TRAINED_IN}"


# ------------------------------------------------------------------ description


def describe(
    folder: Path,
    experiment: Experiment,
    *,
    command: str,
    records: int,
    suite: Suite,
    machine: str,
    precisions: Mapping[str, bool],
) -> None:
    """Write what the report says about how the numbers came about.

    Args:
        command: what a person types to get the same.
        records: of the training data.
        machine: what it runs on.
    """
    content = {
        "title": experiment.title or experiment.name,
        "command": command,
        "model": experiment.model,
        "learnt from": f"{records:,} records of {experiment.task.data}",
        "suite": f"{suite.name}, version {suite.version}",
        "seeds": experiment.seeds,
        "machine": machine,
        **{fact: AUTOCAST if on else experiment.dtype for fact, on in precisions.items()},
        "versions": {
            name: version(name) for name in ("corda-vlm", "torch", "transformers", "peft")
        },
    }
    write_json(folder / DESCRIPTION, content)


def machine_of(model: nn.Module) -> str:
    """The device that a model is on, by name."""
    import torch

    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()
