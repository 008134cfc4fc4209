"""What it costs to hold a model to what it knows: emoji-clip learning digits by the ways of the study, rank 8, batches of 32.

    python eval/benchmarks/holding_cost.py                     # three minutes on one core
    python eval/benchmarks/holding_cost.py --rounds 9 --out runs/bench/holding_cost.json

Each way has a model of its own, and their steps take turns in one process, so that all see the same machine: the task's loss and
the terms, forward and backward, clipping, AdamW. "a step" is the mean of CPU seconds over whole rounds of steps (a term may be added at
every third only), the median over rounds, beside that of plain LoRA; "held" what is kept in memory while it trains, beside
LoRA: factors, matrices, teacher's features, buffers of the base. "needs" is what there has to be: bytes are those of the files.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from corda_vlm import load_model, prepare_method
from corda_vlm.anchor import anchor_penalty
from corda_vlm.covariance import CovarianceStore, GradientStore, collect_covariance
from corda_vlm.data import Records, load_records, make_batches
from corda_vlm.families import detect_family
from corda_vlm.text_table import text_table
from corda_vlm.train import TaskGradientOptions, TrainOptions, task_gradient
from corda_vlm.train.objectives import make_objective
from corda_vlm.train.terms import KnowledgeData, TaskData, Term, TermOptions, make_terms

KNOWN = {"source": "parquet:model_zoo/emoji-clip/data/*.parquet", "split": "train", "limit": 256}
DIGITS = {"source": "sklearn:digits", "split": "train", "limit": 256}
TEMPLATES = ["the digit {}"]
ROUND = 12
"""Steps of a round: of every period that a term has by default."""


@dataclass(frozen=True)
class Way:
    """How a model is held: a method, an anchor (its options), terms that look at data, and AdamW's decay."""

    method: str = "lora"
    anchor: dict[str, Any] | None = None
    terms: TermOptions = field(default_factory=TermOptions)
    decay: float = 0.0


WAYS = {
    "lora": Way(),
    "lora-decay": Way(decay=3.0),
    "lora-l2": Way(anchor={"metric": "identity"}),
    "lora-anchor": Way(anchor={}),
    "lora-kfac": Way(anchor={"output_side": "kfac"}),
    "corda-kpm-anchor": Way("corda-kpm", anchor={}),
    "corda-natural": Way("corda-natural"),
    "natural-kfac": Way("corda-natural", anchor={"output_side": "kfac"}),
    "lora-ewc": Way(terms=TermOptions(ewc=1.0)),
    "lora-kl-new": Way(terms=TermOptions(kl_new=1.0)),
    "lora-replay": Way(terms=TermOptions(replay=0.3)),
    "lora-distill": Way(terms=TermOptions(distill=30.0)),
    "natural-distill": Way("corda-natural", terms=TermOptions(distill=30.0)),
}


@dataclass(frozen=True)
class Measured:
    """What the ways take their terms from."""

    store: CovarianceStore
    gradient: GradientStore
    task: Records
    known: Records


def live_bytes() -> int:
    """Bytes of all tensors that there are, those of one storage counted once."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (torch.Tensor, nn.Parameter)
    }
    return sum(storages.values())


def prepared(way: Way, given: Measured) -> Callable[[int], float]:
    """(number of the step) -> its CPU seconds, of a model that is held in one way."""
    loaded = load_model("emoji-clip", device="cpu")
    sources: dict[str, Any] = {}
    if way.method == "corda-kpm":
        sources = {"store": given.store}
    if way.method == "corda-natural":
        sources = {"store": given.store, "gradient": given.gradient}
    model = prepare_method(
        way.method, loaded.model, rank=8, towers="vision", show_progress=False, **sources
    )
    options = TrainOptions(loss="prompt", steps=1, batch_size=32, bf16=False)
    family = detect_family(loaded.model)
    objective = make_objective(
        options, model, family, loaded.processor, given.task, None, TEMPLATES
    )
    batch = next(iter(make_batches(given.task, loaded.processor, batch_size=32)))
    known = KnowledgeData(given.known)
    terms = make_terms(way.terms, model, loaded.processor, known, TaskData(given.task, options))
    if way.anchor is not None:
        terms.append(Term("anchor", anchor_penalty(model, given.store, **way.anchor), 30.0))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=way.decay, fused=True)
    model.train()

    def step(number: int) -> float:
        started = time.process_time()
        loss = objective(loaded.model, batch)[0]
        for term in terms:
            if number % term.every == 0:
                loss = loss + term.weight * term.every * term.value(number, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - started

    return step


def needs(way: Way, sizes: dict[str, int]) -> str:
    """What a way takes beside the model and the task's records."""
    files = []
    if way.method != "lora" or (way.anchor is not None and "metric" not in way.anchor):
        kfac = way.anchor is not None and "output_side" in way.anchor
        files.append(f"covariances, {sizes['both sides' if kfac else 'input'] / 1e6:.1f} MB")
    if way.method == "corda-natural":
        files.append(f"the task's gradient, {sizes['gradient'] / 1e6:.1f} MB, before training")
    if way.terms.needs_data:
        files.append("the knowledge's records")
    return "; ".join(files) or "nothing"


def measured(folder: Path) -> tuple[Measured, dict[str, int]]:
    """Covariances and gradient of the base model, and the bytes that they take in files."""
    loaded = load_model("emoji-clip", device="cpu")
    known, task = load_records(KNOWN), load_records(DIGITS)
    sizes = {}
    for name, output_side in (("input", False), ("both sides", True)):
        store = collect_covariance(
            loaded.model, make_batches(known, loaded.processor, batch_size=32), towers="vision", output_side=output_side,
            show_progress=False, path=folder / f"{output_side}.safetensors",
        )  # fmt: skip
        sizes[name] = (folder / f"{output_side}.safetensors").stat().st_size
    gradient = task_gradient(
        loaded.model, task, loaded.processor, options=TaskGradientOptions(loss="prompt", towers="vision"), templates=TEMPLATES,
        path=folder / "gradient.safetensors", show_progress=False,
    )  # fmt: skip
    sizes["gradient"] = (folder / "gradient.safetensors").stat().st_size
    return Measured(store, gradient, task, known), sizes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of a dozen steps each")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        given, sizes = measured(Path(folder))
        step, held = {}, {}
        for name in dict.fromkeys(["lora", *args.ways]):
            before = live_bytes()
            step[name] = prepared(WAYS[name], given)
            step[name](0)  # caches, the optimizer's state
            held[name] = live_bytes() - before
        seconds: dict[str, list[float]] = {name: [] for name in step}
        for _ in range(args.rounds):
            taken = [{name: step[name](number) for name in step} for number in range(ROUND)]
            for name in step:
                seconds[name].append(sum(found[name] for found in taken) / ROUND)
    plain = statistics.median(seconds["lora"])
    rows = []
    for name, found in seconds.items():
        ratios = [own / lora for own, lora in zip(found, seconds["lora"], strict=True)]
        rows.append({
            "way": name, "seconds": round(statistics.median(found), 4), "of lora": round(statistics.median(ratios), 3),
            "held MB": round((held[name] - held["lora"]) / 1e6, 1), "needs": needs(WAYS[name], sizes),
        })  # fmt: skip
    print(f"a step of plain lora: {plain:.3f} s of CPU\n")
    table = [[r["way"], f"{r['of lora']:.2f}", f"{r['held MB']:.1f} MB", r["needs"]] for r in rows]
    print(text_table(table, ["way", "a step, × lora", "held", "needs"], [False, True, True, False]))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"lora_seconds": plain, "ways": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
