"""The verbs of the command line: run, sites, calibrate, gradient, plan, train, evaluate, export, report.

Each is a thin function over the classes of options: it refuses what can be told to be wrong before PyTorch is imported, calls
the library, and says what there is now. Each reads the file that the verb before it wrote, and refuses one made from
another model or other data.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from corda_vlm.adapter.options import AttachOptions
from corda_vlm.covariance.options import CalibrationOptions
from corda_vlm.data.spec import parse_spec
from corda_vlm.data.text.chat_options import ChatOptions
from corda_vlm.errors import CordaError
from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.experiment import checks
from corda_vlm.extras import require
from corda_vlm.families.options import LoadOptions, SiteOptions
from corda_vlm.options import Count, Seed, as_keywords, narrowed
from corda_vlm.plan.options import PlanOptions
from corda_vlm.train.options import TaskGradientOptions, TrainOptions
from corda_vlm.train.terms.options import TermOptions

if TYPE_CHECKING:
    from corda_vlm.families import Loaded

Data = str | dict[str, Any]


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


def sites(model: str, *, full: bool = False, sites: SiteOptions, load: LoadOptions) -> None:
    """Print the weight matrices that can be adapted: towers, blocks, roles, shapes, streams.

    Example:
        corda-vlm sites emoji-clip --towers vision

    Args:
        model: A built-in name, a folder, or an id on a hub.
        full: One line a matrix.
    """
    checks.check_source(model)
    from corda_vlm.sites import find_sites, sites_table

    loaded = _loaded(model, load)
    chosen = find_sites(loaded.model, **as_keywords(sites, SiteOptions))
    print(sites_table(loaded.model, chosen, full=full))


def calibrate(
    model: str,
    data: Data,
    output: str = "covariance.safetensors",
    *,
    options: CalibrationOptions,
    load: LoadOptions,
) -> None:
    """Collect the second moments of the layers' inputs over data; resumes when interrupted.

    Example:
        corda-vlm calibrate emoji-clip folder:photos --samples 256 --towers vision

    Args:
        model: A built-in name, a folder, or an id on a hub.
        data: Images, texts or both, e.g. folder:photos, or a mapping like '{source: "parquet:x.parquet", split: train}'; for
            a model that generates text with a format:, e.g. llava, chat, qa, alpaca or text.
        output: The file to write, and to go on from.
    """
    checks.check_source(model)
    checks.check_data(data)
    checks.check_output(output)
    from corda_vlm.experiment import steps

    records, loaded = steps.load_data(data), _loaded(model, load)
    before = _modified(output)
    store = steps.calibrate(loaded, records, output, options)
    print(store.summary())
    done = f"{output} was complete before" if before == _modified(output) else f"wrote {output}"
    _next(done, "plan", model, "--covariance", output, "--output", "plan.json")


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
    named, asked = _listed_or_file(classes), _listed_or_file(templates)
    checks.check_class_names(named, asked, None)
    checks.check_output(output)
    from corda_vlm.experiment import steps
    from corda_vlm.train import task_gradient

    records, loaded = steps.load_data(data), _loaded(model, load)
    names, prompts = steps.training_prompts(records, named, asked)
    before = _modified(output)
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
    done = f"{output} was complete before" if before == _modified(output) else f"wrote {output}"
    _next(
        done, "plan", model, "--method", "corda-natural", "--covariance", "covariance.safetensors", "--gradient", output
    )  # fmt: skip


def plan(
    model: str,
    covariance: str | None = None,
    task_covariance: str | None = None,
    gradient: str | None = None,
    output: str = "plan.json",
    picture: str | None = None,
    dry_run: bool = False,
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
    from corda_vlm.experiment import steps
    from corda_vlm.plan import AdapterPlan, plan_adapter

    loaded = _loaded(model, load)
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
    if picture is not None:
        from corda_vlm.report.plots.plan import plan_heatmap  # it imports matplotlib

        if plan_heatmap({Path(output).stem: planned}, Path(picture)):
            print(f"\nwrote {picture}")
    if not dry_run:
        _next(f"wrote {output}", "train", model, "DATA", "--plan", output, "--output", "adapter")


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
    named, asked = _listed_or_file(classes), _listed_or_file(templates)
    checks.check_class_names(named, asked, None)
    for spec in (knowledge, terms.probe):
        if spec is not None:
            checks.check_data(spec)
    checks.check_file(plan, "plan", "make it by corda-vlm plan")
    for path in (covariance, task_covariance):
        checks.check_file(path, "covariance", "make it by corda-vlm calibrate")
    checks.check_output(output, folder=True)
    from corda_vlm.adapter import attach_adapter
    from corda_vlm.covariance import CovarianceStore
    from corda_vlm.experiment import steps
    from corda_vlm.plan import AdapterPlan
    from corda_vlm.train.terms.make import KnowledgeData, check_terms

    records, loaded = steps.load_data(data), _loaded(model, load)
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
    result, _ = steps.train_anchored(
        attach_adapter(loaded.model, planned, **as_keywords(attach, AttachOptions)),
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
    _next(done, "evaluate", model, "SUITE", "--adapter", str(result.weights))


def evaluate(
    model: str,
    suite: str,
    adapter: str | None = None,
    scales: str | None = None,
    output: str | None = None,
    *,
    options: EvalOptions,
    load: LoadOptions,
) -> None:
    """Measure a model, with what was trained or without, on a suite of tasks; not what the file of scores has already.

    Example:
        corda-vlm evaluate emoji-clip emoji-digits --adapter adapter --limit 200

    Args:
        model: A built-in name, a folder, or an id on a hub; with --adapter the model before training.
        suite: The name of a shipped suite, or a YAML file.
        adapter: Folder of a training: an adapter, or a full fine-tune.
        scales: Strengths of what was trained, from 0 to 2, e.g. 0.25,0.5,0.75,1 (WiSE-FT); 0 is the model before
            training, 1 the trained one, and above 1 it goes further than training did.
        output: A scores file (JSON lines) to add the scores to.
    """
    strengths = checks.check_strengths(scales, adapter)
    checks.check_source(model)
    to_measure = checks.check_evaluation(suite, options)
    if adapter is not None:
        checks.check_folder(adapter, "training's", "make it by corda-vlm train")
    checks.check_output(output)
    from corda_vlm.evaluation import Cache
    from corda_vlm.evaluation.score_file import check_scores, read_rows, tasks_left
    from corda_vlm.experiment import steps
    from corda_vlm.train.trained import Trained, load_trained

    loaded, cache, added = _loaded(model, load), Cache(), 0
    method = "base" if adapter is None else _name_of(Path(adapter))
    if output is not None:  # before anything is measured for it
        check_scores(output)
    made_from = steps.measured_from(loaded, adapter, to_measure, options, cache)
    trained = Trained(loaded.model) if adapter is None else load_trained(loaded.model, adapter)
    former = [] if output is None else read_rows(output, missing_ok=True)
    former = [row for row in former if row.get("made_from") == made_from.get(row["task"])]
    for scale in strengths:
        if scales is not None:
            print(f"scale {scale:g}")
        left = tasks_left(to_measure, former, made_from, method=method, scale=scale)
        for task in made_from:
            if task not in left:
                print(f"  {task}: measured before, see {output}")
        if not left:
            continue
        for result, rows in steps.measure_into(
            output,
            trained,
            to_measure,
            replace(options, tasks=left),
            scale=scale,
            about={"run": Path(output or "").stem, "method": method},
            processor=loaded.processor,
            cache=cache,
            made_from=made_from,
        ):
            print(f"  {result}")
            added += len(rows)
    if output is not None:
        same = "" if added else ", which has the same already"
        print(f"\nadded {added} scores to {output}{same}")


def export(
    model: str,
    adapter: str,
    output: str,
    format: Literal["lora", "residual", "merged"] = "merged",
    rank: Count | None = None,
    *,
    load: LoadOptions,
) -> None:
    """Write a trained adapter so that plain peft, transformers or open_clip loads it, in the dtype that is given.

    Example:
        corda-vlm export emoji-clip adapter digits-clip --format merged

    Args:
        model: The model that the adapter was trained on.
        adapter: Folder of the trained adapter.
        output: Folder to write.
        format: lora (on the original base), residual (base and adapter), or merged (a plain model).
        rank: With lora: recompress to this rank.
    """
    checks.check_source(model)
    checks.check_folder(adapter, "training's", "make it by corda-vlm train")
    checks.check_output(output, folder=True)
    from corda_vlm.adapter import export_adapter, load_adapter

    trained = load_adapter(_loaded(model, load).model, adapter)
    written = export_adapter(trained, output, format=format, rank=rank, source=model)
    print(f"wrote {written}")


def report(folder: str) -> None:
    """Write the report of a run or a study again, from its scores, and print the table; also while it is going on.

    Example:
        corda-vlm report runs/demo

    Args:
        folder: Of the run, e.g. runs/demo.
    """
    from corda_vlm.run_files import SCORES, STUDY

    checks.check_folder(folder, "run's", "give that of a run or a study, e.g. runs/demo")
    if not (Path(folder) / STUDY).is_file():
        checks.check_file(Path(folder) / SCORES, "scores", "give the folder of a run or a study")
    from corda_vlm.report import summary_table, write_overview, write_report

    # Without the lock of the run, for an early look: each page and picture is written whole or not at all.
    if (Path(folder) / STUDY).is_file():
        for scores in sorted(Path(folder).glob(f"*/{SCORES}")):
            print(f"wrote {write_report(scores.parent)}")
        print(f"wrote {write_overview(folder)}")
        return
    page = write_report(folder)
    print(f"{summary_table(folder)}\n\nwrote {page}")


def _listed_or_file(items: list[str] | None) -> list[str] | str | None:
    """Class names or templates: one item alone names a file of them, but for a template, which has braces."""
    return items[0] if items and len(items) == 1 and "{" not in items[0] else items


def _loaded(model: str, load: LoadOptions) -> Loaded:
    from corda_vlm.families import load_model

    return load_model(model, **as_keywords(load, LoadOptions))


def _modified(path: str) -> int | None:
    from corda_vlm.files import check_path

    return Path(path).stat().st_mtime_ns if check_path(path).exists() else None


def _next(done: str, *words: str) -> None:
    """What there is now, and the command that goes on from it."""
    print(f"\n{done}. Next: corda-vlm {shlex.join(words)}")


def _name_of(adapter: Path) -> str:
    """What scores call an adapter: its folder, and of a training's own `weights/` the training's folder."""
    adapter = adapter.resolve()
    return adapter.parent.name if adapter.name == "weights" else adapter.name


VERBS = {
    verb.__name__: verb
    for verb in (run, sites, calibrate, gradient, plan, train, evaluate, export, report)
}
VERBS["init"] = plan  # what it was called
