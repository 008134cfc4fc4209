"""What adapting a convolutional vision tower takes beside a transformer of open_clip: calibrating, planning, and a training step.

    python eval/benchmarks/convolutional.py                                   # RN50 beside ViT-B-32, about 15 minutes on a core
    python eval/benchmarks/convolutional.py --models RN50 convnext_tiny --repeats 1 --out runs/convolutional.json

Random weights and random pixels: time and memory depend on shapes, not on what is read. Each measurement is a process of its own, and
the models take turns. Seconds are the processor's, as the machine may do other work; memory is the highest resident set above
that of the model, which has run once. "step" is forward, backward and AdamW of the vision tower, of PEFT's LoRA and of
corda-kpm, by turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from init_measure import Peak, machine
from torch import nn

from corda_vlm.covariance import collect_covariance
from corda_vlm.methods import prepare_method, restore_method
from corda_vlm.plan import plan_adapter
from corda_vlm.text_table import text_table

RESULTS = Path(__file__).parent / "results" / "convolutional.json"
KEYS = ("forward", "calibrate", "calibrate_mb", "plan", "plan_mb", "covariances_mb", "sites")


def build(name: str) -> Any:
    """A model of open_clip with random weights; a name of its configurations, or one in a JSON file."""
    import open_clip

    if name.endswith(".json"):
        open_clip.add_model_config(name)
        name = Path(name).stem
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.create_model(name)
    for module in model.modules():
        if isinstance(
            module, nn.BatchNorm2d
        ):  # the last of each block starts at zero, and hides the block
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return model.eval()


def measure(name: str, images: int, batch: int, rank: int, steps: int) -> dict[str, Any]:
    """Processor seconds and megabytes of one model, in this process."""
    model = build(name)
    size = model.visual.image_size
    shape = (batch, 3, *((size, size) if isinstance(size, int) else size))
    generator = torch.Generator().manual_seed(1)
    batches = [
        {"pixel_values": torch.randn(shape, generator=generator)} for _ in range(images // batch)
    ]
    found: dict[str, Any] = {"model": name}

    def timed(stage: str, run: Any) -> Any:
        gc.collect()
        with Peak() as peak:
            began = time.process_time()
            result = run()
            found[stage] = round(time.process_time() - began, 2)
        found[f"{stage}_mb"] = round(peak.mb)
        return result

    encode = torch.no_grad()(lambda: [model.encode_image(b["pixel_values"]) for b in batches])
    encode()
    timed("forward", encode)
    options: dict[str, Any] = {"towers": "vision", "show_progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noise of few images fills no covariance, and need not
        store = timed("calibrate", lambda: collect_covariance(model, batches, **options))
    plan = timed("plan", lambda: plan_adapter(model, store, mode="kpm", rank=rank, **options))
    sums = [entry for stream in store.streams for entry in store.entries(stream)]
    found["covariances_mb"] = round(sum(4 * e.size * (e.size + 1) / 2 for e in sums) / 1e6)
    found["sites"] = len(plan.sites)
    for method in ("lora", "corda-kpm"):
        given = {} if method == "lora" else {"store": store}
        found[f"step {method}"] = _step(
            model, method, batches[0]["pixel_values"], steps, rank, given
        )
    return found


def _step(
    model: nn.Module,
    method: str,
    pixels: torch.Tensor,
    steps: int,
    rank: int,
    given: dict[str, Any],
) -> float:
    """Median processor seconds of a training step."""
    ready: Any = prepare_method(
        method, model, rank=rank, towers="vision", show_progress=False, **given
    )
    ready.train()
    trained = [p for p in ready.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    seconds = []
    for _ in range(steps + 1):
        began = time.process_time()
        ready.encode_image(pixels).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
    restore_method(method, ready)
    return round(statistics.median(seconds[1:]), 3)


def summary(rows: list[dict[str, Any]]) -> str:
    """A line a model: the median of its repeats, and the lowest and highest seconds of calibrating."""
    keys = (*KEYS, "step lora", "step corda-kpm")
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        of = [row for row in rows if row["model"] == name]
        medians = [f"{statistics.median(row[key] for row in of):g}" for key in keys]
        lines.append([Path(name).stem, *medians])
    return text_table(lines, ["model", *keys], [False, *[True] * len(keys)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "RN50"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one is not None:
        print(json.dumps(measure(args.one, args.images, args.batch, args.rank, args.steps)))
        return
    rows: list[dict[str, Any]] = []
    for _ in range(args.repeats):
        for name in args.models:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", name],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            about = {k: v for k, v in vars(args).items() if k not in ("out", "one")}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"arguments": about, "machine": machine(), "rows": rows}, indent=2)
            args.out.write_text(text + "\n")
            print(json.dumps(rows[-1]), flush=True)
    print(summary(rows))


if __name__ == "__main__":
    main()
