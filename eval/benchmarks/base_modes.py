"""The two ways to keep the base under a paired adapter, in bfloat16: "untouched" and "residual".

    python eval/benchmarks/base_modes.py                                # a CLIP of ViT-B/32's size: about 5 minutes on a core
    python eval/benchmarks/base_modes.py --model emoji-clip             # the weights of the model zoo
    python eval/benchmarks/base_modes.py --out runs/base_modes.json     # also as JSON

Measured for each, against the bare bfloat16 model with attention unpacked:

- start: how far the embeddings are off when the adapter is attached, relative to their norm;
- weights: `‖W_effective − W‖ / ‖W‖` over the adapted layers, W_effective being what the layers compute with;
- restored: the same after `restore`;
- step: seconds of forward, backward and AdamW on one batch, both towers (median; the modes take turns), by the
  clock and of CPU time: on a machine that does other work, only the latter means something;
- memory: the process's peak while training, above what it was with the bare model.

Every measurement is a process of its own. The pair is PiSSA's, the largest there is, so the hardest to subtract, unless
`--method` says "milora".
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from corda_vlm.text_table import text_table

BASES = ("untouched", "residual")


def vit_b32() -> nn.Module:
    """A transformers CLIP of ViT-B/32's size with random weights; nothing is downloaded."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    return CLIPModel(CLIPConfig()).eval()


def measure(
    base: Literal["untouched", "residual"],
    model_name: str,
    method: str,
    rank: int,
    batch: int,
    steps: int,
) -> dict[str, float]:
    """All numbers of one mode."""
    from corda_vlm.adapter import attach_adapter, restore
    from corda_vlm.adapter.paired import base_matrix, paired_layers
    from corda_vlm.families import detect_family, load_model
    from corda_vlm.families.layers.attention import unpacked
    from corda_vlm.plan import plan_adapter
    from corda_vlm.sites import find_sites, get_linear

    model = vit_b32() if model_name == "vit-b32" else load_model(model_name).model
    model = model.to(torch.bfloat16)
    family = detect_family(model)
    inputs = make_inputs(model, model_name, batch)

    def embed(network: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            image, text = (
                family.need_contrastive(network).encode_image(network, inputs),
                family.need_contrastive(network).encode_text(network, inputs),
            )
        return torch.cat([image.float().flatten(), text.float().flatten()])

    with unpacked(model):
        before = embed(model)
        original = {
            site.name: get_linear(model, site.name).weight.detach().clone()
            for site in find_sites(model)
        }
    plan = plan_adapter(model, None, method=method, rank=rank, show_progress=False)
    resting = peak_megabytes()
    attached = attach_adapter(model, plan, base=base)
    after = embed(attached)

    def effective(name: str) -> torch.Tensor:
        layer = paired_layers(attached)[name]
        weight = base_matrix(layer).read().double()
        if base == "residual":
            B, A = layer.pair("default")
            weight = weight + B.double() @ A.double()
        return weight

    weights = relative_error(effective, original)
    optimizer = torch.optim.AdamW([p for p in attached.parameters() if p.requires_grad], lr=1e-4)
    times, cpu_times = [], []
    for _ in range(steps + 1):
        started, cpu_started = time.perf_counter(), time.process_time()
        image = family.need_contrastive(attached).encode_image(attached, inputs).float()
        text = family.need_contrastive(attached).encode_text(attached, inputs).float()
        loss = nn.functional.cross_entropy(image @ text.T, torch.arange(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
        cpu_times.append(time.process_time() - cpu_started)
    memory = peak_megabytes() - resting
    bare = restore(attached)
    with unpacked(bare):
        restored = relative_error(lambda name: get_linear(bare, name).weight.detach(), original)
    return {
        "start": float((after - before).norm() / before.norm()),
        "start_max": float((after - before).abs().max() / before.abs().max()),
        "weights": weights,
        "restored": restored,
        "step_seconds": statistics.median(times[1:]),  # the first warms up
        "step_cpu_seconds": statistics.median(cpu_times[1:]),
        "memory_megabytes": memory,
    }


def make_inputs(model: Any, model_name: str, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if hasattr(model, "config"):
        size, length = (
            model.config.vision_config.image_size,
            model.config.text_config.max_position_embeddings,
        )
        vocabulary = model.config.text_config.vocab_size
    else:
        size, length, vocabulary = (
            model.visual.image_size[0],
            model.context_length,
            model.vocab_size,
        )
    ids = torch.randint(1, vocabulary - 2, (batch, length), generator=generator)
    ids[:, -1] = vocabulary - 1
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    return {"pixel_values": pixels.to(torch.bfloat16), "input_ids": ids}


def relative_error(found: Callable[[str], torch.Tensor], true: dict[str, torch.Tensor]) -> float:
    off = sum(float((found(name).double() - w.double()).square().sum()) for name, w in true.items())
    return (off / sum(float(w.double().square().sum()) for w in true.values())) ** 0.5


def peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="vit-b32", help="vit-b32 (random weights), or anything load_model takes"
    )
    parser.add_argument("--method", default="pissa", choices=["pissa", "milora", "olora"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--one", choices=BASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(
            json.dumps(
                measure(args.one, args.model, args.method, args.rank, args.batch, args.steps)
            )
        )
        return
    passed = ["--model", args.model, "--method", args.method, "--rank", str(args.rank)]
    passed += ["--batch", str(args.batch), "--steps", str(args.steps)]
    found: dict[str, list[dict[str, float]]] = {base: [] for base in BASES}
    for _ in range(args.repeats):
        for base in BASES:
            command = [sys.executable, __file__, "--one", base, *passed]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            found[base].append(json.loads(done.stdout.strip().splitlines()[-1]))
    medians = {
        base: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for base, runs in found.items()
    }
    keys = list(medians["untouched"])
    print(
        text_table(
            [[base, *(f"{medians[base][k]:.3g}" for k in keys)] for base in BASES],
            ["base", *keys],
            [False, *[True] * len(keys)],
        )
    )
    if args.out:
        described = {"arguments": {k: v for k, v in vars(args).items() if k not in ("out", "one")}}
        described |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({**described, "median": medians, "runs": found}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
