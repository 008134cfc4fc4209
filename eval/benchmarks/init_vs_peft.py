"""The start of a CorDA adapter, by PEFT's `preprocess_corda` and by corda_vlm: time, memory, knowledge energy.

    python eval/benchmarks/init_vs_peft.py --out runs/init_vs_peft                  # all: some 90 minutes on one core
    python eval/benchmarks/init_vs_peft.py --out runs/init_vs_peft --part clip      # (a) a whole CLIP: some 50 minutes
    python eval/benchmarks/init_vs_peft.py --out runs/init_vs_peft --part layers    # (b) large layers: some 40 minutes
    python eval/benchmarks/init_vs_peft.py --out runs/quick --quick                 # tiny sizes, two minutes: does it run?

(a) A transformers CLIP of ViT-B/32's size (its real configuration with random weights; nothing is downloaded), 64
photos and 64 captions that fill the context, r = 16, knowledge-preserved and instruction-previewed. PEFT takes one
sample at a time, because larger batches make it raise. (b) One weight matrix with a given covariance.

Every measurement is a process of its own, the tools take turns, and all have the same number of threads. Each
result is written at once, to a file of its own; the same command goes on where it was stopped. `results.json` and
`table.md` are made from those files, also while some are missing. Seconds are wall-clock: leave the machine alone
meanwhile, or read the processor seconds, which results.json has too.

What is judged is `‖B A C'‖_F`, with C' damped as PEFT ended up damping that layer, against the optimum of a float64
SVD of `W C'`; and the same under C without damping. For that both tools are given PEFT's covariance. Collection is
judged apart: the adapter from our covariance, by its energy under one collected in float64.

With CORDA_VLM_DATA set the photos and class names are Caltech-101's, else generated. PEFT's CorDA needs
`pip install "corda-vlm[bench]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from init_measure import COMPONENTS, SETTINGS, Task, work
from init_table import report

SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]  # a 7B language model's
QUICK_SHAPES = [(96, 96), (96, 160), (160, 96)]


def schedule(part: str, repeats: int, quick: bool, batch_size: int) -> Iterator[Task]:
    """The measurements in order, the tools taking turns."""
    yield Task("rates", quick=quick)
    for repeat in range(repeats if part in ("clip", "all") else 0):
        for mode in COMPONENTS:
            yield Task("clip", "peft", mode, "float32", repeat=repeat, quick=quick)
            for setting in SETTINGS:
                yield Task("clip", "ours", mode, setting, (0, 0), repeat, quick, batch_size)
    # Fewer repeats: PEFT takes minutes. Once for both modes, since it takes the whole SVD whatever the mode.
    for repeat in range(min(repeats, 2) if part in ("layers", "all") else 0):
        for shape in QUICK_SHAPES if quick else SHAPES:
            yield Task("layers", "peft", "both", shape=shape, repeat=repeat, quick=quick)
            for mode in COMPONENTS:
                yield Task("layers", "ours", mode, shape=shape, repeat=repeat, quick=quick)


def run_all(
    tasks: list[Task], out: Path, threads: int, measure: Callable[[Task, Path, int], None]
) -> None:
    """Take the measurements that are not in `out` yet; bring the tables up to date after each."""
    folder = out / "measurements"
    folder.mkdir(parents=True, exist_ok=True)
    for number, task in enumerate(tasks, 1):
        path = folder / f"{task.key}.json"
        if not path.exists():
            print(f"[{number}/{len(tasks)}] {task.key}", file=sys.stderr, end="", flush=True)
            started = time.perf_counter()
            partial = path.with_suffix(".partial")
            measure(task, partial, threads)
            partial.replace(path)
            print(f"  {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            report(out, threads)
    report(out, threads)


def in_a_process(task: Task, out: Path, threads: int) -> None:
    """Measure `task` in a fresh process, which writes its result to `out`."""
    limits = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
    )
    options = ["--worker", json.dumps(asdict(task)), "--out", str(out), "--threads", str(threads)]
    subprocess.run([sys.executable, __file__, *options], check=True, env={**os.environ, **limits})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the results; also where to go on from"
    )
    parser.add_argument("--part", choices=["clip", "layers", "all"], default="all")
    parser.add_argument("--repeats", type=int, default=3, help="of (a), default 3; (b): at most 2")
    parser.add_argument("--threads", type=int, default=1, help="of every measurement (default 1)")
    parser.add_argument("--batch-size", type=int, default=32, help="of our calibration, default 32")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one run each")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        torch.set_num_threads(args.threads)
        fields = json.loads(args.worker)
        result = work(Task(**{**fields, "shape": tuple(fields["shape"])}))
        args.out.write_text(json.dumps(result))
        return
    repeats = 1 if args.quick else args.repeats
    tasks = list(schedule(args.part, repeats, args.quick, args.batch_size))
    run_all(tasks, args.out, args.threads, in_a_process)
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
