"""The verb gradient: the gradient of a task's loss at a model's layers."""

from __future__ import annotations

from corda_vlm.experiment import checks
from corda_vlm.families.options import LoadOptions
from corda_vlm.train.options import TaskGradientOptions
from corda_vlm.verbs.shared import Data, listed_or_file, load_source, modified, say_next


def gradient(
    model: str,
    data: Data,
    output: str = "gradient.safetensors",
    classes: list[str] | None = None,
    templates: list[str] | None = None,
    *,
    options: TaskGradientOptions,
    load: LoadOptions,
) -> None:
    """Take the gradient of a new task's loss at the model as it is, for methods that start from it; resumes when interrupted.

    Example:
        corda-vlm gradient emoji-clip sklearn:digits --towers vision

    Args:
        model: A built-in name, a folder, or an id on a hub.
        data: What the model is to learn, as for the verb `train`.
        output: The file to write, and to go on from.
        classes: Names for the prompts, in label order, or one name alone: of a list in eval/class_names, or of such a file;
            the default is the data's own.
        templates: Prompts with {} for the name, or one name alone without it: of a list in eval/templates, or of such a
            file; the default is "a photo of a {}.".
    """
    checks.check_source(model)
    checks.check_data(data)
    named, asked = listed_or_file(classes), listed_or_file(templates)
    checks.check_class_names(named, asked, None)
    checks.check_output(output)
    from corda_vlm.experiment import steps
    from corda_vlm.train import task_gradient

    records, loaded = steps.load_data(data), load_source(model, load)
    names, prompts = steps.training_prompts(records, named, asked)
    before = modified(output)
    collected = task_gradient(
        loaded.model,
        records,
        loaded.processor,
        options=options,
        classes=names,
        templates=prompts,
        path=output,
    )
    print(collected.summary())
    done = f"{output} was complete before" if before == modified(output) else f"wrote {output}"
    say_next(
        done, "plan", model, "--method", "corda-natural", "--covariance", "covariance.safetensors", "--gradient", output
    )  # fmt: skip
