"""The verbs of the command line: run, sites, calibrate, plan, train, evaluate, export, report.

Each is a thin function over the classes of options: it refuses what can be told to be wrong before PyTorch is imported, calls
the library, and says what there is now. Each reads the file that the verb before it wrote, and refuses one made from
another model or other data.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from corda_vlm.adapter.options import AttachOptions
from corda_vlm.anchor.options import AnchorOptions
from corda_vlm.command_line import call
from corda_vlm.covariance.options import CalibrationOptions
from corda_vlm.errors import CordaError
from corda_vlm.evaluation.options import EvalOptions
from corda_vlm.families.options import LoadOptions, SiteOptions
from corda_vlm.options import Count
from corda_vlm.plan.options import PlanOptions
from corda_vlm.plugins import of_command, without_plugins
from corda_vlm.progress import Meter, be_quiet
from corda_vlm.train.options import TrainOptions

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
    from corda_vlm.experiment.study import check_config, is_study

    # before PyTorch is imported, which takes far longer than a slip deserves
    check_config(experiment, output=output, overrides=set or (), only=only, fresh=fresh)
    from corda_vlm.experiment.runner import run as run_one
    from corda_vlm.experiment.study import run_study

    run_all = run_study if is_study(experiment) else run_one
    run_all(experiment, output=output, overrides=set or (), only=only, fresh=fresh, device=device)


def sites(model: str, *, full: bool = False, sites: SiteOptions, load: LoadOptions) -> None:
    """Print the weight matrices that can be adapted: towers, blocks, roles, shapes, streams.

    Example:
        corda-vlm sites emoji-clip --towers vision

    Args:
        model: A built-in name, a folder, or an id on a hub.
        full: One line a matrix.
    """
    from corda_vlm.experiment.checks import check_source

    check_source(model)
    from corda_vlm.sites import find_sites, sites_table

    loaded = _loaded(model, load)
    chosen = find_sites(loaded.model, towers=sites.towers, roles=sites.roles)
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
    from corda_vlm.experiment.checks import check_data, check_output, check_source

    check_source(model)
    check_data(data)
    check_output(output)
    from corda_vlm.covariance import CollectOptions, collect_covariance
    from corda_vlm.data import data_warnings, load_records, make_batches
    from corda_vlm.options import as_keywords

    loaded = _loaded(model, load)
    batches = make_batches(
        load_records(data),
        loaded.processor,
        batch_size=options.batch_size,
        shuffle=True,
        seed=options.seed,
        limit=options.samples,
        chat=options,
    )
    before = _modified(output)
    store = collect_covariance(
        loaded.model, batches, path=output, **as_keywords(options, CollectOptions)
    )
    print(store.summary())
    for warning in data_warnings(batches.builder):
        print(warning, file=sys.stderr)
    done = f"{output} was complete before" if before == _modified(output) else f"wrote {output}"
    _next(done, "plan", model, "--covariance", output, "--output", "plan.json")


def plan(
    model: str,
    covariance: str | None = None,
    task_covariance: str | None = None,
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
        output: The plan, a JSON file; its factors go beside it.
        picture: Draw ranks and compactness over blocks and roles into this file.
        dry_run: Print the plan and write nothing but the picture.
    """
    from corda_vlm.experiment.checks import check_file, check_output, check_source
    from corda_vlm.extras import require

    check_source(model)
    for path in (covariance, task_covariance):
        check_file(path, "covariance", "make it by corda-vlm calibrate")
    check_output(picture)
    if picture is not None:
        require("matplotlib", "report", "--picture")
    if not dry_run:
        check_output(output)
    from corda_vlm.covariance import CovarianceStore
    from corda_vlm.locks import locked
    from corda_vlm.options import as_keywords
    from corda_vlm.plan import plan_adapter

    loaded = _loaded(model, load)
    store, task_store = (
        None if path is None else CovarianceStore.load(path, model=loaded.model)
        for path in (covariance, task_covariance)
    )
    with nullcontext() if dry_run else locked(output):
        planned = plan_adapter(
            loaded.model, store, task_store=task_store, **as_keywords(options, PlanOptions)
        )
        print(planned.table())
        if picture is not None:
            from corda_vlm.report.plots.plan import plan_heatmap  # it imports matplotlib

            if plan_heatmap({Path(output).stem: planned}, Path(picture)):
                print(f"\nwrote {picture}")
        if not dry_run:
            planned.save(output)
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
    *,
    options: TrainOptions,
    attach: AttachOptions,
    anchor: AnchorOptions,
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
        classes: Names for the prompts, in label order; the default is the data's own.
        templates: Prompts with {} for the name; the default is "a photo of a {}.".
        covariance: The file that `calibrate` wrote of the knowledge; without an anchor the forecast of forgetting is
            logged only.
    """
    from corda_vlm.experiment.checks import check_data, check_file, check_output, check_source

    if anchor.anchor and covariance is None:
        raise CordaError(
            "--anchor needs to know what to hold to: give --covariance, the file that `corda-vlm calibrate` wrote"
        )
    check_source(model)
    check_data(data)
    check_file(plan, "plan", "make it by corda-vlm plan")
    check_file(covariance, "covariance", "make it by corda-vlm calibrate")
    check_output(output, folder=True)
    from corda_vlm.adapter import attach_adapter
    from corda_vlm.anchor import anchor_penalty
    from corda_vlm.covariance import CovarianceStore
    from corda_vlm.data import load_records
    from corda_vlm.options import as_keywords
    from corda_vlm.plan import AdapterPlan
    from corda_vlm.train import train as train_adapter

    records = load_records(data)
    loaded = _loaded(model, load)
    store = None if covariance is None else CovarianceStore.load(covariance, model=loaded.model)
    planned = AdapterPlan.load(plan, model=loaded.model)
    adapter = attach_adapter(loaded.model, planned, **as_keywords(attach, AttachOptions))
    result = train_adapter(
        adapter,
        records,
        loaded.processor,
        options=options,
        output_dir=output,
        classes=classes,
        templates=templates,
        anchor=None if store is None else anchor_penalty(adapter, store),
        anchor_weight=anchor.anchor,
        anchor_every=anchor.anchor_every,
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
    """Measure a model, with what was trained or without, on a suite of tasks.

    Example:
        corda-vlm evaluate emoji-clip emoji-digits --adapter adapter --limit 200

    Args:
        model: A built-in name, a folder, or an id on a hub; with --adapter the model before training.
        suite: The name of a shipped suite, or a YAML file.
        adapter: Folder of a training: an adapter, or a full fine-tune.
        scales: Strengths of what was trained, e.g. 0.25,0.5,0.75,1 (WiSE-FT); 0 is the model before, 1 the trained one.
        output: A scores file (JSON lines) to add the scores to.
    """
    from corda_vlm.experiment import checks

    numbers = [1.0] if scales is None else _numbers("scales", scales)
    if scales is not None and adapter is None:
        raise CordaError(
            "--scales mixes the model before training with the trained one: give the model before training as MODEL "
            "and the folder of the training as --adapter"
        )
    checks.check_source(model)
    checks.check_measured(suite, options)
    if adapter is not None:
        checks.check_folder(adapter, "training's", "make it by corda-vlm train")
    checks.check_output(output)
    from corda_vlm.evaluation import Cache, add_result, read_rows
    from corda_vlm.evaluation.measure import measure
    from corda_vlm.jsonl import PATIENCE
    from corda_vlm.locks import locked
    from corda_vlm.options import as_keywords
    from corda_vlm.train.trained import Trained, check_scales, load_trained

    strengths = check_scales(numbers)
    loaded = _loaded(model, load)
    trained = Trained(loaded.model) if adapter is None else load_trained(loaded.model, adapter)
    method = "base" if adapter is None else _name_of(Path(adapter))
    cache = Cache()
    if output is not None:  # before anything is measured for it
        with locked(output, wait=PATIENCE):
            read_rows(output, missing_ok=True)
    added = 0
    for scale in strengths:
        if scales is not None:
            print(f"scale {scale:g}")
        with trained.at_scale(scale) as head:
            for result in measure(
                trained.model,
                suite,
                processor=loaded.processor,
                head=head,
                cache=cache,
                show_progress=True,
                **as_keywords(options, EvalOptions),
            ):
                print(f"  {result}")
                if output is not None:
                    run = Path(output).stem
                    added += len(add_result(output, result, run=run, method=method, scale=scale))
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
    from corda_vlm.experiment.checks import check_folder, check_output, check_source

    check_source(model)
    check_folder(adapter, "training's", "make it by corda-vlm train")
    check_output(output, folder=True)
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
    from corda_vlm.experiment.checks import check_file, check_folder
    from corda_vlm.run_files import SCORES, STUDY

    check_folder(folder, "run's", "give that of a run or a study, e.g. runs/demo")
    if not (Path(folder) / STUDY).is_file():
        check_file(Path(folder) / SCORES, "scores", "give the folder of a run or a study")
    from corda_vlm.report import summary_table, write_overview, write_report

    # Without the lock of the run, for an early look: each page and picture is written whole or not at all.
    if (Path(folder) / STUDY).is_file():
        for scores in sorted(Path(folder).glob(f"*/{SCORES}")):
            print(f"wrote {write_report(scores.parent)}")
        print(f"wrote {write_overview(folder)}")
        return
    page = write_report(folder)
    print(f"{summary_table(folder)}\n\nwrote {page}")


def _numbers(what: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise CordaError(
            f"--{what} is numbers separated by commas, e.g. 0.25,0.5,1; got {text!r}"
        ) from None


def _loaded(model: str, load: LoadOptions) -> Loaded:
    from corda_vlm.families import load_model
    from corda_vlm.options import as_keywords

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
    verb.__name__: verb for verb in (run, sites, calibrate, plan, train, evaluate, export, report)
}
VERBS["init"] = plan  # what it was called


_ABOUT = (
    "Fine-tune vision-language models without losing what they know. Each verb reads the file that the one before it \
wrote, refuses one made from another model or other data, and resumes when interrupted. Every verb takes --quiet: \
results, warnings and errors alone, no progress; and --plugin FILE.py, which runs a file of yours first, e.g. to \
register a method. What takes long tells how far it is every half minute where the standard error is a file, and \
TQDM_DISABLE=1 turns that off."
)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a person reads it, without the line of source that raised it."""
    print(f"corda-vlm: warning: {message}", file=sys.stderr)


def main(args: Sequence[str] | None = None) -> None:
    """The console script. Wrong input ends with its message and status 2, Ctrl-C with status 130."""
    given = list(sys.argv[1:] if args is None else args)
    quiet = "--quiet" in given
    be_quiet(quiet)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _show_warning
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("corda_vlm").setLevel(logging.WARNING if quiet else logging.INFO)
    if quiet or not sys.stderr.isatty():  # bars of others: a log wants lines
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    try:
        with Meter(" ".join(["corda-vlm", *given[:1]]), bar=False):
            words, plugins = without_plugins([word for word in given if word != "--quiet"])
            with of_command(plugins):
                call(VERBS, words, _ABOUT)
    except CordaError as error:
        print(f"corda-vlm: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # who reads it has read enough, e.g. head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (
        OSError,
        MemoryError,
    ) as error:  # the machine's own no: a folder without permission, a bad disk
        reason = getattr(error, "strerror", None) or str(error) or "there is not enough memory"
        about = getattr(error, "filename", None)
        print(
            f"corda-vlm: {reason[:1000]}" + (f": {about!s:.500}" if about else ""), file=sys.stderr
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt as stopped:
        print(f"\n{stopped or 'stopped; run the same command again to go on'}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
