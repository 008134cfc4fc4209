"""Measuring a model: images a second beside CLIP_benchmark, tokens a second beside lm-eval.

    python eval/benchmarks/evaluation_speed.py images                                    # with CLIP_benchmark's interpreter
    python eval/benchmarks/evaluation_speed.py tokens --model SmolLM2-135M-Instruct.gguf # with lm-eval's

`make integrations TOOLS="clip_benchmark lm_eval"` makes an environment for each, in `.venvs/`, that has this package too. Same model in
the same precision, same data, batch and threads; the tools take turns in one process, after one run each that is not counted.
Given are medians of CPU seconds, the median of the ratio of each turn, and what both measured, which has to be equal.

images: emoji-clip on the drawings of OpenMoji, written as a webdataset in CLIP_benchmark's layout; decoding, preprocessing, prompts and
forward passes, float32. tokens: the log-likelihood of answers after their questions, sums and products with their results, at most `--limit`.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from corda_vlm import evaluate, load_model
from corda_vlm.data import load_records
from corda_vlm.families import Loaded
from corda_vlm.text_table import text_table

Run = Callable[[], dict[str, float]]


def ours_of(loaded: Loaded, suite: dict[str, Any], args: argparse.Namespace) -> Run:
    """Our measure of the suite, in float32."""

    def ours() -> dict[str, float]:
        scores = evaluate(
            loaded, suite, bf16=False, batch_size=args.batch_size, resamples=200, show_progress=False
        )  # fmt: skip
        return {score.metric: score.value for score in scores}

    return ours


def images(args: argparse.Namespace, folder: Path) -> tuple[int, Run, Run]:
    """How many images, our run and CLIP_benchmark's."""
    from clip_benchmark.datasets.builder import build_dataset  # pyright: ignore[reportMissingImports]
    from clip_benchmark.metrics.zeroshot_classification import (  # pyright: ignore[reportMissingImports]
        evaluate as zero_shot,
    )

    from corda_vlm.integrations.clip_benchmark import as_theirs, suite_of

    count = webdataset(folder, args.limit)
    loaded = load_model(args.model or "emoji-clip")
    suite = suite_of(folder)
    model, transform, tokenizer = as_theirs(loaded.model, loaded.processor)

    def theirs() -> dict[str, float]:
        data = build_dataset(
            dataset_name=f"wds/{folder.name}",
            root=str(folder),
            transform=transform,
            split="test",
            task="zeroshot_classification",
        )
        loader = torch.utils.data.DataLoader(
            data.batched(args.batch_size), batch_size=None, num_workers=0
        )
        found = zero_shot(
            model, loader, tokenizer, data.classes, data.templates, "cpu", amp=False, verbose=False
        )
        return {"top1": found["acc1"], "top5": found["acc5"]}

    return count, ours_of(loaded, suite, args), theirs


def webdataset(folder: Path, limit: int) -> int:
    """Drawings of OpenMoji as CLIP_benchmark lays data out; returns their number."""
    (folder / "test").mkdir(parents=True)
    source = "parquet:model_zoo/emoji-clip/data/openmoji.parquet"
    records = load_records({"source": source, "split": "openmoji", "label": "label"})
    count = min(limit, len(records))
    with tarfile.open(folder / "test" / "0.tar", "w") as archive:
        for number in range(count):
            record, picture = records[number], io.BytesIO()
            record["image"].save(picture, "PNG")
            label = str(record["label"])
            for ending, content in (("png", picture.getvalue()), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(records.class_names or ()) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a drawing of {c}\n{c}\n")
    return count


def tokens(args: argparse.Namespace, folder: Path) -> tuple[int, Run, Run]:
    """How many tokens of answers and questions, our run and lm-eval's."""
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    from corda_vlm.integrations.lm_eval import as_lm

    pairs = questions(args.limit)
    folder.mkdir(parents=True)
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
    (folder / "sums.jsonl").write_text("\n".join(lines) + "\n")
    suite = {
        "name": "sums",
        "version": 1,
        "tasks": [
            {
                "name": "sums",
                "role": "retention",
                "kind": "likelihood",
                "data": {"source": f"jsonl:{folder / 'sums.jsonl'}", "format": "qa"},
                "options": {"chat_template": "plain"},
                "metrics": ["log_likelihood"],
            }
        ],
    }
    loaded = load_model(args.model, dtype=torch.float32)
    processor: Any = loaded.processor
    lm = as_lm(loaded.model, processor, batch_size=args.batch_size)
    plain = [(f"Question: {question}\nAnswer:", f" {answer}") for question, answer in pairs]
    count = sum(len(processor.tokenizer(a + b)["input_ids"]) for a, b in plain)

    def theirs() -> dict[str, float]:
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
            for number, pair in enumerate(plain)
        ]
        found = lm.loglikelihood(requests, disable_tqdm=True)
        return {"log_likelihood": statistics.fmean(float(total) for total, _ in found)}

    return count, ours_of(loaded, suite, args), theirs


def questions(count: int) -> list[tuple[str, str]]:
    """Sums and products in words, of lengths that differ, with worked answers."""
    pairs = []
    for number in range(count):
        a, b, c = 13 + 7 * number % 91, 5 + 11 * number % 83, 2 + number % 7
        story = f"A shop had {a} apples and bought {b} more. " * (1 + number % 4)
        question = f"{story}How much is {a} + {b}, and {c} times that?"
        pairs.append((question, f"{a} + {b} = {a + b}, and {c} times that is {c * (a + b)}."))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["images", "tokens"])
    parser.add_argument("--model", help="what load_model takes; images: emoji-clip by default")
    parser.add_argument("--limit", type=int, default=500, help="images or questions")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.what == "tokens" and not args.model:
        parser.error("tokens needs --model: a language model's folder, hub id or GGUF file")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        prepare = images if args.what == "images" else tokens
        count, ours, theirs = prepare(args, Path(temporary) / args.what)
        runs = {"corda_vlm": ours, "CLIP_benchmark" if args.what == "images" else "lm-eval": theirs}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        values: dict[str, dict[str, float]] = {}
        for turn in range(args.repeats + 1):
            for name, run in runs.items():
                started = time.process_time()
                values[name] = run()
                if turn:
                    seconds[name].append(time.process_time() - started)
    first, second = (values[name] for name in runs)
    shared = [metric for metric in first if metric in second]
    if off := [m for m in shared if not math.isclose(first[m], second[m], rel_tol=1e-4)]:
        parser.exit(1, f"they measure {off[0]} as {first[off[0]]} and {second[off[0]]}\n")
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    rows = [
        [name, f"{statistics.median(own):.2f}", f"{count / statistics.median(own):,.0f}", ", ".join(f"{m} {values[name][m]:.4f}" for m in shared)]
        for name, own in seconds.items()
    ]  # fmt: skip
    head = ["tool", "CPU seconds", f"{args.what} a second", "measured"]
    print(text_table(rows, head, right=(False, True, True, False)))
    print(
        f"\nthe other takes {ratio:.2f} times as long; {count} {args.what}, batch {args.batch_size}"
    )
    if args.out:
        described = {key: value for key, value in vars(args).items() if key != "out"}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        found = {"seconds": seconds, "values": values, "count": count, "ratio": ratio}
        args.out.write_text(json.dumps({"arguments": described, **found}, indent=1, default=str))


if __name__ == "__main__":
    main()
