"""The verb new: a first experiment for data that somebody has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from corda_vlm.errors import CordaError
from corda_vlm.experiment import checks
from corda_vlm.verbs.shared import say_next


def new(
    data: str,
    model: str | None = None,
    knowledge: str | None = None,
    output: str | None = None,
    quick: bool = False,
) -> None:
    """Look at some data and write a first experiment and its suite for it, ready for corda-vlm run.

    Example:
        corda-vlm new photos/flowers --knowledge photos/imagenet --output flowers

    Args:
        data: What is to be learned: a folder with one folder of pictures a class, a file of JSON lines, JSON, CSV or parquet, the
            id of a data set on a hub, or a spec such as sklearn:digits.
        model: What learns; the default is a usual one for such data.
        knowledge: Data of the kind that the model should not forget, given as DATA is; some of it is looked at while training, other
            records of it are measured. Built-in models with a suite of their own need none.
        output: Folder for experiment.yaml and suite.yaml; the default is named as the data.
        quick: Limits everywhere, so that all of it runs in a minute or two, to see that it works.
    """
    name = _name(data)
    folder = Path(output or name)
    checks.check_output(folder, folder=True)
    for file in (folder / "experiment.yaml", folder / "suite.yaml"):
        if file.exists():
            raise CordaError(f"{file} is there already; give another --output")
    if model is not None:
        checks.check_source(model)
    import torch

    from corda_vlm.experiment.starter import Machine, look_at, starter, write_starter

    looked = look_at(data)
    kept = None if knowledge is None else look_at(knowledge)
    machine = Machine(torch.cuda.is_available())
    folder = folder.resolve()
    experiment, suite = starter(
        name, looked, kept, model=model, machine=machine, quick=quick, folder=folder
    )
    words = ["corda-vlm", "new", data, *(["--model", model] if model else [])]
    words += ["--knowledge", knowledge] if knowledge else []
    words += ["--output", output] if output else []
    config = write_starter(
        folder, experiment, suite, shlex.join([*words, *(["--quick"] if quick else [])]), quick
    )
    classes = f", {len(looked.classes)} classes" if looked.classes else ""
    print(f"{data}: {looked.count:,} records to learn from, {looked.is_}{classes}")
    say_next(f"wrote {config} and suite.yaml beside it", "run", str(config))


def _name(data: str) -> str:
    """What the experiment is called: the last part of the data's name."""
    last = data.partition(":")[2] or data
    name = re.sub(r"[^\w.-]+", "-", Path(last.rstrip("/*")).stem).strip("-.") or "own"
    return name if name[0].isalnum() else f"own-{name}"
