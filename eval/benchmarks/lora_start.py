"""How far the `lora` export of a start departs from the residual while it is trained: emoji-clip-hf learning digits.

    python eval/benchmarks/lora_start.py --out runs/bench/lora_start.json    # some ten minutes on one core

A tool that never touches the base starts CorDA from `[0, B₀] [A₀; 0]`, a LoRA of rank 2r whose product is zero. It is trained
as plain PEFT, beside the residual export (rank r) and a LoRA of PEFT's own start (ranks r and 2r), on the same batches in the
same order with the same optimizer (AdamW without weight decay, constant rate). Given is ‖Δ − Δ'‖ / ‖Δ'‖, where Δ' is the change that
the residual made at the same rate and seed: of the embeddings of test digits ("new"), of held-out emoji ("known"), and of the
weights of all layers, which also differ where no input is.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from corda_vlm import evaluate, export_adapter, load_model
from corda_vlm.adapter import adapt
from corda_vlm.adapter.paired import base_of, trained
from corda_vlm.adapter.wrapped.targets import anchored
from corda_vlm.data import load_records, make_batches
from corda_vlm.families import detect_family
from corda_vlm.files import write_json
from corda_vlm.text_table import text_table
from corda_vlm.train import TrainOptions
from corda_vlm.train.objectives import make_objective
from corda_vlm.train.steps import StepOrder

MODEL = "emoji-clip-hf"
KNOWN = {"source": "parquet:model_zoo/emoji-clip/data/noto.parquet", "split": "train"}
DIGITS = {"source": "sklearn:digits", "split": "train"}
STEPS = (1, 10, 50, 200)
WAYS = ("residual", "lora export", "plain lora, r", "plain lora, 2r")

WHAT = ("new", "known", "weights")
SEEN = {
    "new": {"source": "sklearn:digits", "split": "test", "limit": 128},
    "known": {"source": "parquet:model_zoo/emoji-clip/data/openmoji.parquet", "limit": 128},
}

Changes = dict[str, dict[str, Tensor]]
"""Of each of `WHAT`, by name."""


def start(way: str, folder: Path, rank: int, seed: int) -> Any:
    """A model as a tool has it that knows PEFT alone; the exports are in `folder`."""
    torch.manual_seed(seed)
    loaded = load_model(MODEL)
    if way.startswith("plain"):
        width = rank if way.endswith(" r") else 2 * rank
        saved: Any = LoraConfig.from_pretrained(str(folder / "lora"))
        sites = sorted(saved.target_modules)
        config = LoraConfig(r=width, lora_alpha=width, target_modules=anchored(sites))
        return loaded, get_peft_model(loaded.model, config)
    place = folder / ("residual" if way == "residual" else "lora")
    base = load_model(place / "base").model if way == "residual" else loaded.model
    return loaded, PeftModel.from_pretrained(base, str(place), is_trainable=True)


def write_exports(folder: Path, rank: int, samples: int) -> None:
    """Both exports of one start."""
    loaded = load_model(MODEL)
    batches = make_batches(
        load_records(KNOWN), loaded.processor, batch_size=64, shuffle=True, limit=samples
    )
    model = adapt(loaded.model, batches, mode="kpm", rank=rank, a_norm=10.0, towers="vision", show_progress=False)  # fmt: skip
    for format in ("residual", "lora"):
        export_adapter(model, folder / format, format=format, source=MODEL)


def state(loaded: Any, model: PeftModel, pixels: dict[str, Tensor]) -> Changes:
    """What is compared, as it is now: B A of every layer, and embeddings."""
    weights = {}
    for name, layer in base_of(model).named_modules():
        if isinstance(layer, LoraLayer):
            B, A = trained(layer, "default")
            weights[name] = layer.scaling["default"] * (B.detach().double() @ A.detach().double())
    encode = detect_family(loaded.model).need_contrastive(loaded.model).encode_image
    model.eval()
    with torch.no_grad():
        embedded = {
            what: {what: nn.functional.normalize(encode(model, seen), dim=-1).double()}
            for what, seen in pixels.items()
        }
    model.train()
    return {**embedded, "weights": weights}


def less(one: Changes, other: Changes) -> Changes:
    return {
        what: {name: value - other[what][name] for name, value in parts.items()}
        for what, parts in one.items()
    }


def training(
    way: str, folder: Path, *, rank: int, rate: float, seed: int, steps: tuple[int, ...], size: int
) -> Iterator[tuple[int, Changes, float, Any]]:
    """The change of every layer and the mean loss since the last, at each of `steps`; and the model."""
    loaded, model = start(way, folder, rank, seed)
    pixels = {
        what: next(iter(make_batches(load_records(spec), loaded.processor, batch_size=128)))["pixel_values"]
        for what, spec in SEEN.items()
    }  # fmt: skip
    first = state(loaded, model, pixels)
    data = load_records(DIGITS)
    family = detect_family(loaded.model)
    options = TrainOptions(loss="prompt", bf16=False)
    objective = make_objective(
        options, model, family, loaded.processor, data, None, ["the digit {}"]
    )
    builder = make_batches(data, loaded.processor, batch_size=size).builder
    order = StepOrder(len(data), size, seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses: list[float] = []
    model.train()
    for step in range(max(steps)):
        loss, _ = objective(model, builder.batch(order.indices(step)))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step + 1 in steps:
            change = less(state(loaded, model, pixels), first)
            yield step + 1, change, sum(losses) / len(losses), (loaded, model)
            losses.clear()


def departure(one: Changes, other: Changes) -> dict[str, float]:
    """‖one − other‖ / ‖other‖ of each of `WHAT`."""
    apart = less(one, other)
    return {what: _norm(apart[what]) / _norm(other[what]) for what in WHAT}


def _norm(parts: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts.values()))


def scores(loaded: Any, model: Any, limit: int) -> dict[str, float]:
    """What was learned, and what is kept."""
    model.eval()
    found = evaluate(model, "emoji-digits", processor=loaded.processor, limit=limit)
    return {score.task: score.value for score in found if score.task != "digits-val" and score.metric == "top1"}  # fmt: skip


def measure(rank: int, rates: list[float], seeds: list[int], steps: tuple[int, ...], *, samples: int, size: int, limit: int) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each way, rate and seed."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        write_exports(Path(place), rank, samples)
        for rate in rates:
            for seed in seeds:
                reference: dict[int, Changes] = {}
                for way in WAYS:
                    row: dict[str, Any] = {"way": way, "rate": rate, "seed": seed, "apart": {}, "loss": {}}  # fmt: skip
                    for step, change, loss, parts in training(
                        way, Path(place), rank=rank, rate=rate, seed=seed, steps=steps, size=size
                    ):
                        reference.setdefault(step, change)
                        row["apart"][step] = departure(change, reference[step])
                        row["loss"][step] = loss
                        if step == max(steps):
                            loaded, model = parts
                            row["scores"] = scores(loaded, model, limit)
                    rows.append(row)
                    print(row, flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    steps = list(rows[0]["apart"])
    tasks = list(rows[0]["scores"])
    headings = ["way", "rate", "seed", *(f"{what} at {step}" for what in WHAT for step in steps), "loss", *tasks]  # fmt: skip
    lines = [
        [row["way"], f"{row['rate']:g}", row["seed"],
         *(f"{row['apart'][step][what]:.3f}" for what in WHAT for step in steps),
         f"{row['loss'][steps[-1]]:.3f}", *(f"{row['scores'][task]:.1%}" for task in tasks)]
        for row in rows
    ]  # fmt: skip
    return text_table(lines, headings, [False] + [True] * (len(headings) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, default=400, help="records of each task")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.rank, args.rates, args.seeds, STEPS, samples=256, size=32, limit=args.limit)
    print(summary(rows))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"rank": args.rank, "rows": rows})


if __name__ == "__main__":
    main()
