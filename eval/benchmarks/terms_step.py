"""What terms of the loss that look at data add to a training step: emoji-clip learning digits, a LoRA of rank 8, batches of 32.

    python eval/benchmarks/terms_step.py                     # about a minute on one core
    python eval/benchmarks/terms_step.py --steps 30

For each term steps without it and the term alone, forward and backward, take turns in one process. Given are medians of
CPU seconds: on a machine that does other work, only they mean something. "every n" is the term's share of a plain step
where it is added at every n-th step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from corda_vlm import load_model, prepare_method
from corda_vlm.data import load_records, make_batches
from corda_vlm.families import detect_family
from corda_vlm.text_table import text_table
from corda_vlm.train import TrainOptions
from corda_vlm.train.objectives import make_objective
from corda_vlm.train.terms import KnowledgeData, TaskData, TermOptions, distillation, make_terms

KNOWN = {
    "source": "parquet:model_zoo/emoji-clip/data/*.parquet",
    "split": "train",
    "limit": 64,
}
DIGITS = {"source": "sklearn:digits", "split": "train", "limit": 64}
EVERY = (1, 2, 3, 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32])
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model("emoji-clip", device="cpu")
    model = prepare_method("lora", loaded.model, rank=8, towers="vision")
    task, known = load_records(DIGITS), load_records(KNOWN)
    options = TrainOptions(loss="prompt", steps=1, bf16=False)
    family, processor = detect_family(loaded.model), loaded.processor
    objective = make_objective(options, model, family, processor, task, None, ["the digit {}"])
    batch = next(iter(make_batches(task, processor, batch_size=32)))
    terms: dict[str, Callable[[int], Tensor]] = {
        f"distill, {size} records": distillation(
            model, make_batches(known, processor, batch_size=size)
        )
        for size in args.sizes
    }
    asked = TermOptions(replay=1.0, kl_new=1.0, ewc=1.0)
    for term in make_terms(asked, model, processor, KnowledgeData(known), TaskData(task, options)):
        terms[term.name] = lambda number, term=term: term.value(number, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *terms)}
    model.train()
    for number in range(args.steps + 2):
        started = time.process_time()
        objective(loaded.model, batch)[0].backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds["plain"].append(time.process_time() - started)
        for name, term in terms.items():
            started = time.process_time()
            term(number).backward()
            seconds[name].append(time.process_time() - started)
            optimizer.zero_grad()
    median = {name: statistics.median(found[2:]) for name, found in seconds.items()}
    plain = median.pop("plain")
    print(f"a plain step: {plain:.3f} s of CPU")
    rows = [
        [name, f"{own:.3f} s", *(f"{own / n / plain:.0%}" for n in EVERY)]
        for name, own in median.items()
    ]
    print(text_table(rows, ["term", "CPU", *(f"every {n}" for n in EVERY)], [False, *[True] * 5]))


if __name__ == "__main__":
    main()
