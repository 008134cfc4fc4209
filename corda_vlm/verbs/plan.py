"""The verb plan: an adapter's start."""

from __future__ import annotations

from pathlib import Path

from corda_vlm.experiment import checks
from corda_vlm.extras import require
from corda_vlm.families.options import LoadOptions, Quantization
from corda_vlm.options import as_keywords
from corda_vlm.plan.options import PlanOptions
from corda_vlm.verbs.shared import load_source, say_next


def plan(
    model: str,
    covariance: str | None = None,
    task_covariance: str | None = None,
    gradient: str | None = None,
    output: str = "plan.json",
    picture: str | None = None,
    dry_run: bool = False,
    rounding: Quantization | None = None,
    *,
    options: PlanOptions,
    load: LoadOptions,
) -> None:
    """Plan an adapter: decompose each weight matrix by its covariance and choose the components to adapt.

    Example:
        corda-vlm plan emoji-clip --covariance covariance.safetensors --mode kpm --rank 8 --a-norm 10

    Args:
        model: A built-in name, a folder, or an id on a hub.
        covariance: The file that `calibrate` wrote.
        task_covariance: Of sc-lora: the file that `calibrate` wrote of the new task.
        gradient: Of corda-natural, lora-ga and keep-lora, and of ranks by the task: the file that the verb `gradient` wrote.
        output: The plan, a JSON file; its factors go beside it.
        picture: Draw ranks, and what they follow, over blocks and roles into this file.
        dry_run: Print the plan and write nothing but the picture.
        rounding: Print too what quantising the base to nf4 or int8 would cost with this plan: how far its layers start from the
            original, in their weights and, with --covariance, in their outputs.
    """
    checks.check_source(model)
    for path in (covariance, task_covariance):
        checks.check_file(path, "covariance", "make it by corda-vlm calibrate")
    checks.check_file(gradient, "gradient", "make it by corda-vlm gradient")
    checks.check_output(picture)
    if picture is not None:
        require("matplotlib", "report", "--picture")
    if not dry_run:
        checks.check_output(output)
    from corda_vlm.covariance import CovarianceStore, GradientStore
    from corda_vlm.distributed.agree import is_first
    from corda_vlm.experiment import steps
    from corda_vlm.plan import AdapterPlan, plan_adapter, quantization_errors

    loaded = load_source(model, load)
    store, task_store = (
        None if path is None else CovarianceStore.load(path, model=loaded.model)
        for path in (covariance, task_covariance)
    )

    of_task = None if gradient is None else GradientStore.load(gradient, model=loaded.model)

    def make() -> AdapterPlan:
        chosen = as_keywords(options, PlanOptions)
        return plan_adapter(loaded.model, store, task_store=task_store, gradient=of_task, **chosen)

    planned = make() if dry_run else steps.write_plan(output, make)
    print(planned.table())
    if rounding is not None and is_first():
        print(f"\n{quantization_errors(loaded.model, rounding, store=store, plan=planned)}")
    if picture is not None and is_first():
        from corda_vlm.report.plots.plan import plan_heatmap  # it imports matplotlib

        if plan_heatmap({Path(output).stem: planned}, Path(picture)):
            print(f"\nwrote {picture}")
    if not dry_run:
        base = ("--quantization", planned.quantize_to) if planned.quantize_to else ()
        words = ("train", model, "DATA", *base, "--plan", output, "--output", "adapter")
        say_next(f"wrote {output}", *words)
