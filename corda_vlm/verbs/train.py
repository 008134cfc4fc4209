"""The verb train: an adapter of a model, or its weights."""

from __future__ import annotations

from pathlib import Path

from corda_vlm.adapter.options import AttachOptions
from corda_vlm.covariance.options import CalibrationOptions
from corda_vlm.data.spec import parse_spec
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.errors import CordaError
from corda_vlm.experiment import checks
from corda_vlm.families.options import LoadOptions, Quantization
from corda_vlm.options import Count, Seed, as_keywords, narrowed
from corda_vlm.train.options import TrainOptions
from corda_vlm.train.terms.options import TermOptions
from corda_vlm.verbs.shared import Data, listed_or_file, load_source, say_next


def train(
    model: str,
    data: Data,
    plan: str = "plan.json",
    output: str = "adapter",
    classes: list[str] | None = None,
    templates: list[str] | None = None,
    covariance: str | None = None,
    task_covariance: str | None = None,
    knowledge: Data | None = None,
    knowledge_samples: Count = CalibrationOptions.samples,
    knowledge_seed: Seed = CalibrationOptions.seed,
    quantize_base: Quantization | None = None,
    *,
    options: TrainOptions,
    attach: AttachOptions,
    terms: TermOptions,
    load: LoadOptions,
) -> None:
    """Attach a plan and train it on data; resumes when interrupted.

    Example:
        corda-vlm train emoji-clip sklearn:digits --plan plan.json --steps 20 --learning-rate 2e-3

    Args:
        model: The model that the plan was made for.
        data: Images with labels (prompt loss) or with texts (contrastive loss); for a model that generates text
            conversations, questions or documents (next_token loss).
        plan: The file that the verb `plan` wrote.
        output: Folder for checkpoints and the trained adapter.
        classes: Names for the prompts, in label order, or one name alone: of a list in eval/class_names, or of such a file;
            the default is the data's own.
        templates: Prompts with {} for the name, or one name alone without it: of a list in eval/templates, or of such a
            file; the default is "a photo of a {}.".
        covariance: The file that `calibrate` wrote of the knowledge; without an anchor the forecast of forgetting is
            logged only.
        knowledge: Records of the knowledge, for the terms of the loss that look at such: data as for `calibrate`. Where no
            such term is asked for, it is distill.
        knowledge_samples: At most so many of them, drawn at random: the same as `calibrate --samples` draws.
        knowledge_seed: Of the draw: with that of `calibrate --seed` the records are the same.
        task_covariance: The file that `calibrate` wrote of the new task, for --anchor-metric task.
        quantize_base: Keep the base in nf4 or int8 once the adapter is attached: with --base residual what is quantised is what the pair
            leaves of the weights (QPiSSA).
    """
    if knowledge is not None:
        terms = terms.with_data()
    if terms.anchors_to("knowledge") and covariance is None:
        raise CordaError(
            "--anchor needs to know what to hold to: give --covariance, the file that `corda-vlm calibrate` wrote"
        )
    if terms.anchors_to("task") and task_covariance is None:
        raise CordaError(
            "--anchor-metric task needs to know the new task's inputs: give --task-covariance, the file that `corda-vlm "
            "calibrate` wrote of its data"
        )
    if task_covariance is not None and not terms.anchors_to("task"):
        raise CordaError(
            "--task-covariance has no effect: it is of an anchor to the task; give --anchor with --anchor-metric task, or leave "
            "it out"
        )
    if terms.keep is not None and knowledge is None and terms.probe is None:
        raise CordaError(
            "--keep is told by records of the knowledge that nothing trains on: give --knowledge, a data spec as for calibrate, or "
            "--probe, one of such records alone"
        )
    asked_of = terms.with_budget(has_data=knowledge is not None, has_store=covariance is not None)
    asked_of.check_data(knowledge is not None, "give --knowledge, a data spec as for calibrate")
    terms.check_training(options, options.loss_for(parse_spec(data).format))
    checks.check_source(model)
    checks.check_data(data)
    named, asked = listed_or_file(classes), listed_or_file(templates)
    checks.check_class_names(named, asked, None)
    for spec in (knowledge, terms.probe):
        if spec is not None:
            checks.check_data(spec)
    checks.check_file(plan, "plan", "make it by corda-vlm plan")
    for path in (covariance, task_covariance):
        checks.check_file(path, "covariance", "make it by corda-vlm calibrate")
    checks.check_output(output, folder=True)
    from corda_vlm.adapter import attach_adapter
    from corda_vlm.adapter import quantize_base as quantize
    from corda_vlm.covariance import CovarianceStore
    from corda_vlm.experiment import steps
    from corda_vlm.plan import AdapterPlan
    from corda_vlm.train.terms.make import KnowledgeData, check_terms

    records, loaded = steps.load_data(data), load_source(model, load)
    known = None
    if knowledge is not None:
        known = KnowledgeData(
            steps.load_data(knowledge),
            knowledge_samples,
            knowledge_seed,
            narrowed(options, ChatOptions),
            Path(output),
        )
        check_terms(asked_of, loaded.family, known.records)
    names, prompts = steps.training_prompts(records, named, asked)
    store, task_store = (
        None if path is None else CovarianceStore.load(path, model=loaded.model)
        for path in (covariance, task_covariance)
    )
    planned = AdapterPlan.load(plan, model=loaded.model)
    adapted = attach_adapter(loaded.model, planned, **as_keywords(attach, AttachOptions))
    if quantize_base is not None:
        quantize(adapted, quantize_base)
    result, _ = steps.train_anchored(
        adapted,
        records,
        loaded.processor,
        options=options,
        output_dir=output,
        classes=names,
        templates=prompts,
        knowledge=store,
        terms=terms,
        knowledge_data=known,
        task=task_store,
        probe=None if terms.probe is None else steps.load_data(terms.probe),
    )
    print(f"{result.steps} steps in {result.seconds:.0f} s, loss {result.final_loss:.3f}")
    finished = result.resumed_from == result.steps
    done = f"{output} was finished before" if finished else f"wrote {result.weights}"
    say_next(done, "evaluate", model, "SUITE", "--adapter", str(result.weights))
