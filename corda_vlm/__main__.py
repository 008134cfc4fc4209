"""The verbs of the command line: run, sites, calibrate, init, train, evaluate, export, report.

Each is a typed function, each reads the file that the verb before it wrote, and refuses one made from another
model or other data. An option that takes several values is given several times, or once with a list in YAML.
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

from corda_vlm.command_line import call
from corda_vlm.data.text.chat_options import Learn, MaxTokens, TooLong
from corda_vlm.errors import CordaError
from corda_vlm.families.tokens import Tokens
from corda_vlm.methods.method import Portion, Side
from corda_vlm.options import Count, NotNegative, Positive, Seed, Share
from corda_vlm.precision import Bf16
from corda_vlm.progress import Meter, be_quiet

if TYPE_CHECKING:
    from corda_vlm.families import Loaded

Data = str | dict[str, Any]
Dtype = Literal["float32", "bfloat16", "float16"]


def run(
    experiment: str,
    output: str | None = None,
    set: list[str] | None = None,
    only: list[str] | None = None,
    fresh: bool = False,
    device: str = "auto",
) -> None:
    """Run an experiment or a study end to end, or go on with it: base scores, calibration, trainings, report.

    Args:
        experiment: a YAML file, e.g. configs/demo.yaml.
        output: folder of the results; default runs/NAME.
        set: an override, e.g. --set training.steps=10 --set 'seeds=[0, 1]'.
        only: names of the variants to train, or of a study's experiments to run, e.g. --only lora.
        fresh: delete the folder's former results first.
        device: cpu, cuda, or auto.
    """
    from corda_vlm.experiment.study import check_config, is_study

    # before PyTorch is imported, which takes far longer than a slip deserves
    check_config(experiment, output=output, overrides=set or (), only=only, fresh=fresh)
    from corda_vlm.experiment.runner import run as run_one
    from corda_vlm.experiment.study import run_study

    run_all = run_study if is_study(experiment) else run_one
    run_all(experiment, output=output, overrides=set or (), only=only, fresh=fresh, device=device)


def sites(
    model: str,
    towers: str | None = None,
    roles: str | None = None,
    full: bool = False,
    dtype: Dtype = "float32",
    trust_remote_code: bool = False,
) -> None:
    """Print the weight matrices that can be adapted: towers, blocks, roles, shapes, streams.

    Args:
        model: a built-in name, a folder, or an id on a hub.
        towers: only these, separated by commas.
        roles: only these, separated by commas.
        full: one line a matrix.
        dtype: of the weights in memory; a language model of billions of parameters wants bfloat16.
        trust_remote_code: run Python code that comes with the model; without, none of it runs.
    """
    from corda_vlm.experiment.checks import check_source

    check_source(model)
    from corda_vlm.sites import find_sites, sites_table

    loaded = _loaded(model, dtype, trust_remote_code=trust_remote_code)
    found = find_sites(loaded.model, towers=towers, roles=roles)
    print(sites_table(loaded.model, found, full=full))


def calibrate(
    model: str,
    data: Data,
    output: str = "covariance.safetensors",
    samples: Count = 256,
    batch_size: Count = 64,
    towers: str | None = None,
    roles: str | None = None,
    rounds: Count = 1,
    precision: Literal["float32", "float64", "bf16", "auto"] = "float32",
    blockwise: bool = False,
    tokens: Tokens = "all",
    chat: str = "auto",
    max_tokens: MaxTokens | None = None,
    too_long: TooLong = "skip",
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Collect the second moments of the layers' inputs over data; resumes when interrupted.

    Args:
        model: a built-in name, a folder, or an id on a hub.
        data: images, texts or both, e.g. folder:photos, or a mapping like '{source: "parquet:x.parquet", split: train}'; for
            a model that generates text with a format:, e.g. llava, chat, qa, alpaca or text.
        output: the file to write, and to go on from.
        samples: at most so many records, drawn at random.
        batch_size: records a forward pass.
        towers: only these, separated by commas.
        roles: only these, separated by commas.
        rounds: disjoint calibration rounds, for CorDA++ to choose from.
        precision: of the sums; bf16 is the fastest where the device multiplies it faster, which auto finds out, and too
            coarse for kpm.
        blockwise: of a language model: one block at a time, whose sums alone are in memory.
        tokens: of a language model: which tokens count; padding never does.
        chat: the chat template: auto for the model's own, plain, bare, chatml, vicuna, or a .jinja file.
        max_tokens: of a conversation; default: the model's context.
        too_long: what to do with longer ones: skip and count them, truncate, or error.
        seed: of the draw.
        dtype: of the weights in memory; a language model of billions of parameters wants bfloat16.
        device: cpu, cuda, or auto.
        device_map: auto spreads a language model over all GPUs.
        trust_remote_code: run Python code that comes with the model; without, none of it runs.
    """
    from corda_vlm.experiment.checks import check_data, check_output, check_source

    check_source(model)
    check_data(data)
    check_output(output)
    from corda_vlm.covariance import collect_covariance
    from corda_vlm.data import ChatOptions, data_warnings, load_records, make_batches
    from corda_vlm.sites import find_sites

    loaded = _loaded(model, dtype, device, device_map, trust_remote_code=trust_remote_code)
    batches = make_batches(
        load_records(data),
        loaded.processor,
        batch_size=batch_size,
        shuffle=True,
        seed=seed,
        limit=samples,
        chat=ChatOptions(chat, max_tokens=max_tokens, too_long=too_long),
    )
    chosen = find_sites(loaded.model, towers=towers, roles=roles)
    before = _modified(output)
    store = collect_covariance(
        loaded.model,
        batches,
        chosen,
        rounds=rounds,
        precision=precision,
        tokens=tokens,
        path=output,
        blockwise=blockwise,
    )
    print(store.summary())
    for told in data_warnings(batches.builder):
        print(told, file=sys.stderr)
    done = f"{output} was complete before" if before == _modified(output) else f"wrote {output}"
    _next(done, "init", model, "--covariance", output, "--output", "plan.json")


def init(
    model: str,
    covariance: str | None = None,
    output: str = "plan.json",
    method: str = "corda",
    mode: Literal["kpm", "ipm"] = "kpm",
    rank: Count = 16,
    a_norm: Positive | None = None,
    damping: NotNegative = 1e-4,
    side: Side | None = None,
    task_covariance: str | None = None,
    beta: Portion | None = None,
    towers: str | None = None,
    roles: str | None = None,
    dynamic_rank: bool = False,
    budget: Count | None = None,
    min_rank: Count = 1,
    max_rank: Count | None = None,
    dynamic_covariance: bool = False,
    picture: str | None = None,
    dry_run: bool = False,
    dtype: Dtype = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Plan an adapter: decompose each weight matrix by its covariance and choose the components to adapt.

    Args:
        model: a built-in name, a folder, or an id on a hub.
        covariance: the file that `calibrate` wrote.
        output: the plan, a JSON file; its factors go beside it.
        method: corda, pissa, milora, olora, sc-lora or lora-null.
        mode: kpm adapts what the calibration data uses least, ipm what it uses most.
        rank: of the adapters.
        a_norm: norm of each row of A at the start; default: the paper's split.
        damping: of the covariance, as a share of its mean diagonal.
        side: directions of each layer's output or input, or auto: input where a layer is wider than it is tall.
        task_covariance: sc-lora: the file that `calibrate` wrote of the new task.
        beta: sc-lora: weight of the knowledge against the task, 0 to 1.
        towers: only these, separated by commas.
        roles: only these, separated by commas.
        dynamic_rank: share the same number of parameters out by compactness (CorDA++).
        budget: with dynamic_rank: trainable parameters, in place of as many as RANK everywhere.
        min_rank: with dynamic_rank: no matrix gets less.
        max_rank: with dynamic_rank: no matrix gets more.
        dynamic_covariance: each site takes the best of its calibration rounds (CorDA++).
        picture: draw ranks and compactness over blocks and roles into this file.
        dry_run: print the plan and write nothing but the picture.
        dtype: of the weights in memory.
        device: cpu, cuda, or auto.
        trust_remote_code: run Python code that comes with the model; without, none of it runs.
    """
    from corda_vlm.errors import UnknownNameError
    from corda_vlm.experiment.checks import check_file, check_output, check_source
    from corda_vlm.extras import require
    from corda_vlm.plan.bases import PLAN_METHODS

    check_source(model)
    if method not in PLAN_METHODS:
        raise UnknownNameError("plan method", method, PLAN_METHODS)
    for path in (covariance, task_covariance):
        check_file(path, "covariance", "make it by corda-vlm calibrate")
    check_output(picture)
    if picture is not None:
        require("matplotlib", "report", "--picture")
    if not dry_run:
        check_output(output)
    from corda_vlm.covariance import CovarianceStore
    from corda_vlm.locks import locked
    from corda_vlm.plan import plan_adapter

    loaded = _loaded(model, dtype, device, trust_remote_code=trust_remote_code)
    store, task_store = (
        None if path is None else CovarianceStore.load(path, model=loaded.model)
        for path in (covariance, task_covariance)
    )
    with nullcontext() if dry_run else locked(output):
        plan = plan_adapter(
            loaded.model,
            store,
            mode=mode,
            rank=rank,
            method=method,
            task_store=task_store,
            a_norm=a_norm,
            damping=damping,
            side=side,
            beta=beta,
            towers=towers,
            roles=roles,
            dynamic_rank=dynamic_rank,
            budget=budget,
            min_rank=min_rank,
            max_rank=max_rank,
            dynamic_covariance=dynamic_covariance,
        )
        print(plan.table())
        if picture is not None:
            from corda_vlm.report.plots.plan import plan_heatmap  # it imports matplotlib

            if plan_heatmap({Path(output).stem: plan}, Path(picture)):
                print(f"\nwrote {picture}")
        if not dry_run:
            plan.save(output)
    if not dry_run:
        _next(f"wrote {output}", "train", model, "DATA", "--plan", output, "--output", "adapter")


def train(
    model: str,
    data: Data,
    plan: str = "plan.json",
    output: str = "adapter",
    classes: list[str] | None = None,
    templates: list[str] | None = None,
    loss: Literal["prompt", "contrastive", "next_token"] | None = None,
    steps: Count | None = None,
    epochs: Positive | None = None,
    batch_size: Count = 64,
    learning_rate: Positive = 2e-3,
    weight_decay: NotNegative = 0.0,
    bf16: Bf16 = "auto",
    seed: Seed = 0,
    freeze_a: bool = False,
    anchor: NotNegative = 0.0,
    covariance: str | None = None,
    augment: Literal["none", "light"] = "none",
    label_smoothing: Share = 0.0,
    train_head: bool = False,
    chat: str = "auto",
    learn: Learn = "all",
    max_tokens: MaxTokens | None = None,
    too_long: TooLong = "skip",
    modules_to_save: list[str] | None = None,
    projector_learning_rate: Positive | None = None,
    gradient_checkpointing: bool = False,
    gradient_accumulation: Count = 1,
    dtype: Dtype = "float32",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Attach a plan and train it on data; resumes when interrupted.

    Args:
        model: the model that the plan was made for.
        data: images with labels (prompt loss) or with texts (contrastive loss); for a model that generates text
            conversations, questions or documents (next_token loss).
        plan: the file that `init` wrote.
        output: folder for checkpoints and the trained adapter.
        classes: names for the prompts, in label order; default: the data's own.
        templates: prompts with {} for the name; default: "a photo of a {}.".
        loss: prompt (classification), contrastive or next_token; default: next_token for data with a format, else prompt.
        steps: optimiser steps; this or epochs.
        epochs: passes over the data.
        batch_size: records a step.
        learning_rate: the peak rate.
        weight_decay: of AdamW.
        bf16: train under bfloat16 autocast: true, false, or auto, where the device multiplies bfloat16 faster.
        seed: of the data order.
        freeze_a: train B only.
        anchor: weight of the penalty on changed outputs on the knowledge; needs --covariance.
        covariance: the file that `calibrate` wrote of the knowledge; without an anchor the forecast of forgetting is
            logged only.
        augment: none, or light (small rotations, shifts and zooms).
        label_smoothing: of the cross-entropy.
        train_head: train the class vectors too, from the prompts on.
        chat: the chat template: auto for the model's own, plain, bare, chatml, vicuna, or a .jinja file.
        learn: which answers of a conversation are learnt.
        max_tokens: of a conversation; default: the model's context.
        too_long: what to do with longer ones: skip and count them, truncate, or error.
        modules_to_save: modules trained whole beside the adapter, e.g. model.multi_modal_projector.
        projector_learning_rate: of what is trained of the projector; default: learning_rate.
        gradient_checkpointing: less memory for a third more time.
        gradient_accumulation: batches a step.
        dtype: of the base model's weights in memory; the adapter is in float32.
        device: cpu, cuda, or auto.
        device_map: auto spreads a language model over all GPUs.
        trust_remote_code: run Python code that comes with the model; without, none of it runs.
    """
    from corda_vlm.data.spec import parse_spec
    from corda_vlm.experiment.checks import check_data, check_file, check_output, check_source
    from corda_vlm.train.options import TrainOptions

    if anchor and covariance is None:
        raise CordaError(
            "--anchor needs to know what to hold to: give --covariance, the file that `corda-vlm calibrate` wrote"
        )
    options = TrainOptions(
        loss=loss or ("prompt" if parse_spec(data).format is None else "next_token"),
        steps=steps,
        epochs=3 if steps is None and epochs is None else epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        bf16=bf16,
        seed=seed,
        augment=augment,
        label_smoothing=label_smoothing,
        train_head=train_head,
        template=chat,
        learn=learn,
        max_tokens=max_tokens,
        too_long=too_long,
        projector_learning_rate=projector_learning_rate,
        gradient_checkpointing=gradient_checkpointing,
        gradient_accumulation=gradient_accumulation,
    )
    check_source(model)
    check_data(data)
    check_file(plan, "plan", "make it by corda-vlm init")
    check_file(covariance, "covariance", "make it by corda-vlm calibrate")
    check_output(output, folder=True)
    from corda_vlm.adapter import attach_adapter
    from corda_vlm.anchor import anchor_penalty
    from corda_vlm.covariance import CovarianceStore
    from corda_vlm.data import load_records
    from corda_vlm.plan import AdapterPlan
    from corda_vlm.train import train as train_adapter

    records = load_records(data)
    loaded = _loaded(model, dtype, device, device_map, trust_remote_code=trust_remote_code)
    store = None if covariance is None else CovarianceStore.load(covariance, model=loaded.model)
    adapter = attach_adapter(
        loaded.model,
        AdapterPlan.load(plan, model=loaded.model),
        freeze_a=freeze_a,
        modules_to_save=modules_to_save or (),
    )
    result = train_adapter(
        adapter,
        records,
        loaded.processor,
        options=options,
        output_dir=output,
        classes=classes,
        templates=templates,
        anchor=None if store is None else anchor_penalty(adapter, store),
        anchor_weight=anchor,
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
    tasks: list[str] | None = None,
    limit: Count | None = None,
    data_root: str | None = None,
    missing: Literal["error", "skip"] = "error",
    batch_size: Count = 64,
    bf16: Bf16 = "auto",
    dtype: Dtype = "float32",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Measure a model, with what was trained or without, on a suite of tasks.

    Args:
        model: a built-in name, a folder, or an id on a hub; with --adapter the model before training.
        suite: the name of a shipped suite, or a YAML file.
        adapter: folder of a training: an adapter, or a full fine-tune.
        scales: strengths of what was trained, e.g. 0.25,0.5,0.75,1 (WiSE-FT); 0 is the model before, 1 the trained one.
        output: a scores file (JSON lines) to add the scores to.
        tasks: only these.
        limit: at most so many examples a task.
        data_root: the folder that {data_root} stands for in the suite.
        missing: whether a task without its data is an error or is skipped.
        batch_size: examples a forward pass.
        bf16: run under bfloat16 autocast: true, false, or auto, where the device multiplies bfloat16 faster.
        dtype: of the weights in memory.
        device: cpu, cuda, or auto.
        device_map: auto spreads a language model over all GPUs.
        trust_remote_code: run Python code that comes with the model; without, none of it runs.
    """
    from corda_vlm.evaluation.suite import load_suite
    from corda_vlm.experiment.checks import (
        check_chosen,
        check_folder,
        check_output,
        check_source,
        check_suite,
    )

    numbers = None if scales is None else _numbers("scales", scales)
    if scales is not None and adapter is None:
        raise CordaError(
            "--scales mixes the model before training with the trained one: give the model before training as MODEL "
            "and the folder of the training as --adapter"
        )
    check_source(model)
    measured = load_suite(suite)
    check_chosen(tasks, [task.name for task in measured.tasks], f"task of suite {suite}")
    if missing == "error":
        check_suite(measured, str(data_root or measured.data_root), tasks)
    if adapter is not None:
        check_folder(adapter, "training's", "make it by corda-vlm train")
    check_output(output)
    from corda_vlm.evaluation import Cache, add_result, read_rows
    from corda_vlm.evaluation.measure import measure
    from corda_vlm.jsonl import PATIENCE
    from corda_vlm.locks import locked
    from corda_vlm.train.trained import Trained, check_scales, load_trained

    strengths = (1.0,) if numbers is None else check_scales(numbers)
    loaded = _loaded(model, dtype, device, device_map, trust_remote_code=trust_remote_code)
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
            results = measure(
                trained.model,
                suite,
                processor=loaded.processor,
                tasks=tasks,
                limit=limit,
                data_root=data_root,
                missing=missing,
                batch_size=batch_size,
                bf16=bf16,
                head=head,
                cache=cache,
                show_progress=True,
            )
            for result in results:
                print(f"  {result}")
                if output is not None:
                    rows = add_result(
                        output, result, run=Path(output).stem, method=method, scale=scale
                    )
                    added += len(rows)
    if output is not None:
        same = "" if added else ", which has the same already"
        print(f"\nadded {added} scores to {output}{same}")


def _numbers(what: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise CordaError(
            f"--{what} is numbers separated by commas, e.g. 0.25,0.5,1; got {text!r}"
        ) from None


def export(
    model: str,
    adapter: str,
    output: str,
    format: Literal["lora", "residual", "merged"] = "merged",
    rank: Count | None = None,
    dtype: Dtype = "float32",
    trust_remote_code: bool = False,
) -> None:
    """Write a trained adapter so that plain peft, transformers or open_clip loads it.

    Args:
        model: the model that the adapter was trained on.
        adapter: folder of the trained adapter.
        output: folder to write.
        format: lora (on the original base), residual (base and adapter), or merged (a plain model).
        rank: lora only: recompress to this rank.
        dtype: of what is written.
        trust_remote_code: run Python code that comes with the model; without, none of it runs.
    """
    from corda_vlm.experiment.checks import check_folder, check_output, check_source

    check_source(model)
    check_folder(adapter, "training's", "make it by corda-vlm train")
    check_output(output, folder=True)
    from corda_vlm.adapter import export_adapter, load_adapter

    loaded = _loaded(model, dtype, trust_remote_code=trust_remote_code)
    trained = load_adapter(loaded.model, adapter)
    written = export_adapter(trained, output, format=format, rank=rank, source=model)
    print(f"wrote {written}")


def report(folder: str) -> None:
    """Write the report of a run or a study again, from its scores, and print the table; also while it is going on.

    Args:
        folder: of the run, e.g. runs/demo.
    """
    from corda_vlm.experiment.checks import check_file, check_folder
    from corda_vlm.report.overview import write_overview
    from corda_vlm.run_files import SCORES, STUDY

    check_folder(folder, "run's", "give that of a run or a study, e.g. runs/demo")
    if not (Path(folder) / STUDY).is_file():
        check_file(Path(folder) / SCORES, "scores", "give the folder of a run or a study")
    from corda_vlm.report import summary_table, write_report

    # Without the lock of the run, for an early look: each page and picture is written whole or not at all.
    if (Path(folder) / STUDY).is_file():
        for scores in sorted(Path(folder).glob(f"*/{SCORES}")):
            print(f"wrote {write_report(scores.parent)}")
        print(f"wrote {write_overview(folder)}")
        return
    page = write_report(folder)
    print(f"{summary_table(folder)}\n\nwrote {page}")


def _loaded(
    model: str,
    dtype: Dtype,
    device: str = "cpu",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    import torch

    from corda_vlm.families import load_model

    return load_model(
        model,
        dtype=getattr(torch, dtype),
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )


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
    verb.__name__: verb for verb in (run, sites, calibrate, init, train, evaluate, export, report)
}


_ABOUT = (
    "Fine-tune vision-language models without losing what they know. Each verb reads the file that the one before it \
wrote, refuses one made from another model or other data, and resumes when interrupted. Every verb takes --quiet: \
results, warnings and errors alone, no progress. What takes long tells how far it is every half minute where the \
standard error is a file, and TQDM_DISABLE=1 turns that off."
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
            call(VERBS, [word for word in given if word != "--quiet"], _ABOUT)
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
