"""The verb run: an experiment or a study, end to end."""

from __future__ import annotations


def run(
    experiment: str,
    output: str | None = None,
    set: list[str] | None = None,
    only: list[str] | None = None,
    fresh: bool = False,
    device: str | None = None,
) -> None:
    """Run an experiment or a study end to end, or go on with it: base scores, calibration, trainings, report.

    Example:
        corda-vlm run configs/demo.yaml --set training.steps=10 --only lora

    Args:
        experiment: A YAML file, e.g. configs/demo.yaml.
        output: Folder of the results; the default is runs/NAME.
        set: An override, e.g. --set training.steps=10 --set 'seeds=[0, 1]'.
        only: Names of the variants to train, or of a study's experiments to run.
        fresh: Delete the folder's former results first.
        device: cpu, cuda, or auto; the default is what the experiment says.
    """
    from corda_vlm.experiment.study import run as run_all

    run_all(experiment, output=output, overrides=set or (), only=only, fresh=fresh, device=device)
