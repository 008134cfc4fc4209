"""What the anchor adds to a training step, for each kind of fine-tuning.

    python eval/benchmarks/anchor_step.py                          # a CLIP of ViT-B/32's size, batch 64: about 10 minutes on a core
    python eval/benchmarks/anchor_step.py --methods lora --steps 5
    python eval/benchmarks/anchor_step.py --out runs/anchor_step.json

One model with random weights, both towers trained, CLIP's contrastive loss under bfloat16 autocast, AdamW, as `train()`
has it. For each method steps without and with the anchor take turns, in one process, so that both see the same
machine. Given are medians of CPU seconds: on a machine that does other work, only they mean something. "penalty" is the
anchor alone, forward and backward, and "overhead" its share of a plain step, which varies less from step to step than the
difference of two steps does. Covariances are those of noise, which are flatter than real ones: the factors of
full fine-tuning are as wide as they get, and what they cost is an upper bound.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from corda_vlm.anchor import anchor_penalty
from corda_vlm.covariance import collect_covariance
from corda_vlm.families import detect_family
from corda_vlm.methods import METHODS, prepare_method, restore_method
from corda_vlm.text_table import text_table
from corda_vlm.train import contrastive_loss

KINDS = ("lora", "corda-kpm", "dora", "full")
RESULTS = Path(__file__).parent / "results" / "anchor_step.json"


def vit_b32() -> nn.Module:
    """A transformers CLIP of ViT-B/32's size with random weights; nothing is downloaded."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    return CLIPModel(CLIPConfig()).eval()


def inputs_of(model: Any, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vision, text = model.config.vision_config, model.config.text_config
    ids = torch.randint(
        1, text.vocab_size - 2, (batch, text.max_position_embeddings), generator=generator
    )
    ids[:, -1] = text.vocab_size - 1
    size = vision.image_size
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(
    method: str, model: nn.Module, store: Any, rank: int, batch: int, steps: int
) -> dict[str, Any]:
    """Seconds of a step without and with the anchor, and what the anchor holds in memory."""
    began = time.process_time()
    needs = store if METHODS[method].needs_store else None
    ready = prepare_method(method, model, rank=rank, store=needs, show_progress=False).train()
    prepared = time.process_time()
    anchor = anchor_penalty(ready, store)
    built = time.process_time()
    family, inputs = detect_family(model), inputs_of(model, batch)
    trained = [p for p in ready.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    seconds: dict[str, list[float]] = {"plain": [], "anchored": [], "penalty": []}
    for round_ in range(steps + 1):
        for kind in ("plain", "anchored") if round_ % 2 else ("anchored", "plain"):
            started = time.process_time()
            with torch.autocast("cpu", torch.bfloat16):
                images = family.need_contrastive(ready).encode_image(ready, inputs["pixel_values"])
                texts = family.need_contrastive(ready).encode_text(ready, inputs)
            contrastive_loss(
                images, texts, family.need_contrastive(ready).logit_scale(ready)
            ).backward()
            if kind == "anchored":
                middle = time.process_time()
                anchor.backward(30.0)
                seconds["penalty"].append(time.process_time() - middle)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds[kind].append(time.process_time() - started)
    median = {kind: statistics.median(found[1:]) for kind, found in seconds.items()}
    value = anchor().item()
    if method != "full":
        restore_method(method, ready)
    return {
        "method": method,
        **{f"{kind}_seconds": round(found, 4) for kind, found in median.items()},
        "overhead": round(median["penalty"] / median["plain"], 4),
        "anchor_megabytes": round(anchor.nbytes / 1e6, 1),
        "prepare_seconds": round(prepared - began, 1),
        "build_seconds": round(built - prepared, 1),
        "sites": len(anchor.sites),
        "value": value,
        "seconds": {k: [round(s, 4) for s in found] for k, found in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = vit_b32()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noise fills no covariance, and need not
        batches = [inputs_of(model, 64, seed) for seed in (1, 2)]
        store = collect_covariance(model, batches, precision="bf16", show_progress=False)
    found = []
    # full last: it leaves no way back
    for method in sorted(args.methods, key=KINDS.index):
        found.append(measure(method, model, store, args.rank, args.batch, args.steps))
        print(json.dumps({k: v for k, v in found[-1].items() if k != "seconds"}), flush=True)
    keys = ["method", "plain_seconds", "penalty_seconds", "overhead", "anchor_megabytes"]
    print(
        text_table(
            [[row["method"], *(f"{row[key]:g}" for key in keys[1:])] for row in found],
            keys,
            [False, *[True] * 4],
        )
    )
    about = {k: v for k, v in vars(args).items() if k != "out"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"arguments": about, "torch": torch.__version__, "rows": found}, indent=2)
    args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
