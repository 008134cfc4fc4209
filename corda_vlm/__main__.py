"""The verbs of the command line: run, sites, calibrate, init, train, evaluate, export, report.

Each is a typed function, each reads the file that the verb before it wrote, and refuses one made from another
model or other data.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from corda_vlm.errors import CordaError

Data = str | dict[str, Any]


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
        set: overrides, e.g. --set '[training.steps=10, "seeds=[0]"]'.
        only: names of the variants to train, or of a study's experiments to run, e.g. --only '[lora]'.
        fresh: delete the folder's former results first.
        device: cpu, cuda, or auto.
    """
    from corda_vlm.run import run as run_one
    from corda_vlm.study import is_study, run_study

    run_all = run_study if is_study(experiment) else run_one
    run_all(experiment, output=output, overrides=set or (), only=only, fresh=fresh, device=device)


def sites(
    model: str,
    towers: str | None = None,
    roles: str | None = None,
    full: bool = False,
) -> None:
    """Print the weight matrices that can be adapted: towers, blocks, roles, shapes, streams.

    Args:
        model: a built-in name, a folder, or an id on a hub.
        towers: only these, separated by commas.
        roles: only these, separated by commas.
        full: one line a matrix.
    """
    from corda_vlm.families import load_model
    from corda_vlm.sites import find_sites, sites_table

    loaded = load_model(model)
    found = find_sites(loaded.model, towers=towers, roles=roles)
    print(sites_table(loaded.model, found, full=full))


def calibrate(
    model: str,
    data: Data,
    output: str = "covariance.safetensors",
    samples: int = 256,
    batch_size: int = 64,
    towers: str | None = None,
    roles: str | None = None,
    rounds: int = 1,
    precision: Literal["float32", "float64", "bf16"] = "float32",
    blockwise: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Collect the second moments of the layers' inputs over data; resumes when interrupted.

    Args:
        model: a built-in name, a folder, or an id on a hub.
        data: images, texts or both, e.g. folder:photos, or a mapping like '{source: "parquet:x.parquet", split: train}'.
        output: the file to write, and to go on from.
        samples: at most so many records, drawn at random.
        batch_size: records a forward pass.
        towers: only these, separated by commas.
        roles: only these, separated by commas.
        rounds: disjoint calibration rounds, for CorDA++ to choose from.
        precision: of the sums; bf16 is the fastest.
        blockwise: of a language model: one block at a time, whose sums alone are in memory.
        seed: of the draw.
        device: cpu, cuda, or auto.
    """
    from corda_vlm.covariance import collect_covariance
    from corda_vlm.data import load_records, make_batches
    from corda_vlm.families import load_model
    from corda_vlm.sites import find_sites

    loaded = load_model(model, device=device)
    batches = make_batches(
        load_records(data),
        loaded.processor,
        batch_size=batch_size,
        shuffle=True,
        seed=seed,
        limit=samples,
    )
    chosen = find_sites(loaded.model, towers=towers, roles=roles)
    store = collect_covariance(
        loaded.model,
        batches,
        chosen,
        rounds=rounds,
        precision=precision,
        path=output,
        blockwise=blockwise,
    )
    print(store.summary())
    print(
        f"\nwrote {output}. Next: corda-vlm init {model} --covariance {output} --output plan.json"
    )


def init(
    model: str,
    covariance: str | None = None,
    output: str = "plan.json",
    method: str = "corda",
    mode: Literal["kpm", "ipm"] = "kpm",
    rank: int = 16,
    a_norm: float | None = None,
    damping: float = 1e-4,
    side: Literal["output", "input", "auto"] | None = None,
    task_covariance: str | None = None,
    beta: float | None = None,
    towers: str | None = None,
    roles: str | None = None,
    dynamic_rank: bool = False,
    budget: int | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    dynamic_covariance: bool = False,
    picture: str | None = None,
    dry_run: bool = False,
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
    """
    from corda_vlm.covariance import CovarianceStore
    from corda_vlm.evaluation.heatmap import plan_heatmap
    from corda_vlm.families import load_model
    from corda_vlm.plan import plan_adapter

    loaded = load_model(model)
    store, task_store = (
        None if path is None else CovarianceStore.load(path, model=loaded.model)
        for path in (covariance, task_covariance)
    )
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
    if picture is not None and plan_heatmap({Path(output).stem: plan}, Path(picture)):
        print(f"\nwrote {picture}")
    if not dry_run:
        plan.save(output)
        print(
            f"\nwrote {output}. Next: corda-vlm train {model} DATA --plan {output} --output adapter"
        )


def train(
    model: str,
    data: Data,
    plan: str = "plan.json",
    output: str = "adapter",
    classes: list[str] | None = None,
    templates: list[str] | None = None,
    loss: Literal["prompt", "contrastive"] = "prompt",
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.0,
    bf16: bool = True,
    seed: int = 0,
    freeze_a: bool = False,
    anchor: float = 0.0,
    covariance: str | None = None,
    augment: Literal["none", "light"] = "none",
    label_smoothing: float = 0.0,
    train_head: bool = False,
    device: str = "auto",
) -> None:
    """Attach a plan and train it on data; resumes when interrupted.

    Args:
        model: the model that the plan was made for.
        data: images with labels (prompt loss) or with texts (contrastive loss).
        plan: the file that `init` wrote.
        output: folder for checkpoints and the trained adapter.
        classes: names for the prompts, in label order; default: the data's own.
        templates: prompts with {} for the name; default: "a photo of a {}.".
        loss: prompt (classification) or contrastive.
        steps: optimiser steps; this or epochs.
        epochs: passes over the data.
        batch_size: records a step.
        learning_rate: the peak rate.
        weight_decay: of AdamW.
        bf16: train under bfloat16 autocast.
        seed: of the data order.
        freeze_a: train B only.
        anchor: weight of the penalty on changed outputs on the knowledge; needs --covariance.
        covariance: the file that `calibrate` wrote of the knowledge; without an anchor the forecast of forgetting is
            logged only.
        augment: none, or light (small rotations, shifts and zooms).
        label_smoothing: of the cross-entropy.
        train_head: train the class vectors too, from the prompts on.
        device: cpu, cuda, or auto.
    """
    from corda_vlm.adapter import attach_adapter
    from corda_vlm.anchor import anchor_penalty
    from corda_vlm.covariance import CovarianceStore
    from corda_vlm.data import load_records
    from corda_vlm.families import load_model
    from corda_vlm.plan import AdapterPlan
    from corda_vlm.train import TrainOptions
    from corda_vlm.train import train as train_adapter

    if anchor and covariance is None:
        raise CordaError(
            "--anchor needs to know what to hold to: give --covariance, the file that `corda-vlm calibrate` wrote"
        )
    options = TrainOptions(
        loss=loss,
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
    )
    loaded = load_model(model, device=device)
    store = None if covariance is None else CovarianceStore.load(covariance, model=loaded.model)
    adapter = attach_adapter(
        loaded.model, AdapterPlan.load(plan, model=loaded.model), freeze_a=freeze_a
    )
    result = train_adapter(
        adapter,
        load_records(data),
        loaded.processor,
        options=options,
        output_dir=output,
        classes=classes,
        templates=templates,
        anchor=None if store is None else anchor_penalty(adapter, store),
        anchor_weight=anchor,
    )
    print(f"{result.steps} steps in {result.seconds:.0f} s, loss {result.final_loss:.3f}")
    print(
        f"wrote {result.weights}. Next: corda-vlm evaluate {model} SUITE --adapter {result.weights}"
    )


def evaluate(
    model: str,
    suite: str,
    adapter: str | None = None,
    scales: str | None = None,
    output: str | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    data_root: str | None = None,
    missing: Literal["error", "skip"] = "error",
    batch_size: int = 64,
    bf16: bool = False,
    device: str = "auto",
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
        bf16: run under bfloat16 autocast.
        device: cpu, cuda, or auto.
    """
    from corda_vlm.evaluation import (
        Cache,
        Trained,
        append_rows,
        check_scales,
        load_trained,
        measure,
        score_row,
    )
    from corda_vlm.families import load_model

    strengths = (1.0,) if scales is None else check_scales(_numbers("scales", scales))
    if scales is not None and adapter is None:
        raise CordaError(
            "--scales mixes the model before training with the trained one: give the model before training as MODEL "
            "and the folder of the training as --adapter"
        )
    loaded = load_model(model, device=device)
    trained = Trained(loaded.model) if adapter is None else load_trained(loaded.model, adapter)
    method = "base" if adapter is None else _name_of(Path(adapter))
    cache = Cache()
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
                if output is not None:
                    rows = [
                        score_row(score, run=Path(output).stem, method=method, scale=scale)
                        for score in result.scores
                    ]
                    append_rows(output, rows)


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
    rank: int | None = None,
) -> None:
    """Write a trained adapter so that plain peft, transformers or open_clip loads it.

    Args:
        model: the model that the adapter was trained on.
        adapter: folder of the trained adapter.
        output: folder to write.
        format: lora (on the original base), residual (base and adapter), or merged (a plain model).
        rank: lora only: recompress to this rank.
    """
    from corda_vlm.adapter import export_adapter, load_adapter
    from corda_vlm.families import load_model

    loaded = load_model(model)
    trained = load_adapter(loaded.model, adapter)
    written = export_adapter(trained, output, format=format, rank=rank, source=model)
    print(f"wrote {written}")


def report(folder: str) -> None:
    """Write the report of a run or a study again, from its scores, and print the table.

    Args:
        folder: of the run, e.g. runs/demo.
    """
    from corda_vlm.evaluation import summary_table, write_report
    from corda_vlm.study import OVERVIEW, write_overview

    if (Path(folder) / OVERVIEW).is_file():
        for scores in sorted(Path(folder).glob("*/scores.jsonl")):
            print(f"wrote {write_report(scores.parent)}")
        print(f"wrote {write_overview(folder)}")
        return
    page = write_report(folder)
    print(f"{summary_table(folder)}\n\nwrote {page}")


def _name_of(adapter: Path) -> str:
    """What scores call an adapter: its folder, and of a training's own `weights/` the training's folder."""
    adapter = adapter.resolve()
    return adapter.parent.name if adapter.name == "weights" else adapter.name


VERBS = {
    verb.__name__: verb for verb in (run, sites, calibrate, init, train, evaluate, export, report)
}


def _as_jsonargparse(args: Sequence[str]) -> list[str]:
    """Options as people write them: `--dry-run` for `--dry_run=true`."""
    verb = VERBS.get(args[0]) if args else None
    switches = {
        f"--{name}"
        for name, parameter in (inspect.signature(verb).parameters.items() if verb else ())
        if isinstance(parameter.default, bool)
    }
    written = []
    for index, arg in enumerate(args):
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            arg = name.replace("-", "_").replace("__", "--", 1) + equals + value
            follows = args[index + 1] if index + 1 < len(args) else ""
            if arg in switches and follows.lower() not in ("true", "false"):
                arg += "=true"
        written.append(arg)
    return written


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as a person reads it, without the line of source that raised it."""
    print(f"corda-vlm: warning: {message}", file=sys.stderr)


def main(args: Sequence[str] | None = None) -> None:
    """The console script. Wrong input ends with its message and status 2, Ctrl-C with status 130."""
    from jsonargparse import auto_cli

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _show_warning
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        auto_cli(
            VERBS,  # pyright: ignore[reportArgumentType]
            args=_as_jsonargparse(sys.argv[1:] if args is None else args),
            prog="corda-vlm",
        )
    except CordaError as error:
        print(f"corda-vlm: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stopped:
        print(f"\n{stopped or 'stopped; run the same command again to go on'}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
