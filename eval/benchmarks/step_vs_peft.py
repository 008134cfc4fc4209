"""A training step of the paired layer beside one of PEFT's own LoRA.

    python eval/benchmarks/step_vs_peft.py                              # a CLIP of ViT-B/32's size, batches of 8 and 64: some 10 minutes
    python eval/benchmarks/step_vs_peft.py --batch 8 --steps 20
    python eval/benchmarks/step_vs_peft.py --out runs/step_vs_peft.json

One model with random weights, the linear layers of both towers' blocks at rank 16, CLIP's contrastive loss, AdamW, float32 or bfloat16
autocast. The three kinds (PEFT's LoRA, an untouched base with its pair, a residual base) train copies of it, and their steps take
turns in one process, so that all see the same machine. Given are CPU seconds of forward, backward and optimizer, and the
median over steps of the ratio to the LoRA step of the same turn, with its quartiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from anchor_step import inputs_of, vit_b32
from init_measure import ROLES, TARGETS
from peft import LoraConfig, get_peft_model
from torch import nn

from corda_vlm.adapter import attach_adapter
from corda_vlm.plan import plan_adapter
from corda_vlm.text_table import text_table
from corda_vlm.train import contrastive_loss

KINDS = ("peft lora", "untouched", "residual")


def trained(kind: str, bare: nn.Module, rank: int) -> nn.Module:
    """A copy of the model with the adapter of this kind, to be trained."""
    model = copy.deepcopy(bare)
    if kind == "peft lora":
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
        return get_peft_model(model, config).train()  # pyright: ignore[reportArgumentType]
    plan = plan_adapter(model, None, method="pissa", rank=rank, roles=ROLES, show_progress=False)
    return attach_adapter(model, plan, base=kind).train()  # pyright: ignore[reportArgumentType]


class Training:
    """One model, its optimizer, and what its steps have cost."""

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        self.model, self.autocast = model, autocast
        weights = [p for p in model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in weights)
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4)
        self.seconds: list[float] = []

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            outputs: Any = self.model(**batch)
        loss = contrastive_loss(outputs.image_embeds, outputs.text_embeds, torch.tensor(14.0))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.process_time() - started)


def measure(bare: nn.Module, batch: int, steps: int, rank: int, autocast: bool) -> dict[str, Any]:
    inputs = inputs_of(bare, batch)
    of = {kind: Training(trained(kind, bare, rank), autocast) for kind in KINDS}
    for _ in range(steps + 1):  # the first warms up
        for training in of.values():
            training.step(inputs)
    found: dict[str, Any] = {}
    lora = of["peft lora"].seconds[1:]
    for kind, training in of.items():
        own = training.seconds[1:]
        ratios = sorted(a / b for a, b in zip(own, lora, strict=True))
        quarter = len(ratios) // 4
        found[kind] = {
            "seconds": statistics.median(own),
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[quarter], ratios[-1 - quarter]],
            "parameters": training.parameters,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bare = small_clip() if args.small else vit_b32()
    results = {
        str(batch): measure(bare, batch, args.steps, args.rank, args.autocast)
        for batch in args.batch
    }
    rows = [
        [batch, kind, f"{one['seconds']:.3f} s", f"{one['ratio']:.3f}", " to ".join(f"{q:.3f}" for q in one["quartiles"])]
        for batch, kinds in results.items()
        for kind, one in kinds.items()
    ]  # fmt: skip
    print(
        text_table(
            rows,
            ["batch", "kind", "CPU a step", "ratio", "quartiles"],
            [True, False, True, True, True],
        )
    )
    if args.out:
        described = {key: value for key, value in vars(args).items() if key != "out"}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"arguments": described, "results": results}, indent=1))


def small_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    torch.manual_seed(0)
    return CLIPModel(
        CLIPConfig(
            text_config={**size, **heads},
            vision_config={**size, **heads, "image_size": 64, "patch_size": 16},
        )
    )


if __name__ == "__main__":
    main()
