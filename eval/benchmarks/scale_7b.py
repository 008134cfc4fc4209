"""What a start costs for a 7B language model and for CLIP's large vision tower, from one block of each.

    python eval/benchmarks/scale_7b.py --out runs/scale_7b                        # both blocks, ours alone: some 10 minutes on a core
    python eval/benchmarks/scale_7b.py --out runs/scale_7b --peft                 # PEFT's decomposition beside it: an hour more
    python eval/benchmarks/scale_7b.py --out runs/quick --small                   # tiny blocks: does it run?

One block of LLaMA-2-7B's shapes (4096, 11008, 32 heads) and one of CLIP-L's at 336 pixels (1024, 4096, 16 heads), of the real
classes with random weights, in bfloat16 unless `--dtype` says otherwise. Inputs are anisotropic: power-law spectra, and a few channels with a
large mean. The language model's block is calibrated blockwise into a file, as `corda-vlm calibrate --blockwise` does, with 8,192
tokens (some 256 samples of 32); the tower with 16 images. Then a plan is made from the file, knowledge-preserved, r = 128 as the paper's.

Given are seconds by the clock and of CPU time, the highest memory above the loaded model, and the floor: the block's forward pass, which
is measured, and what no arrangement of the arithmetic does without, counted and taken at this machine's own best rate for large products: one
triangle of each covariance, one Cholesky factor of each, one factorization of each weight (LU, or a Gram matrix and its Cholesky
factor where it is not square), `W C'` once for each weight. The last table multiplies by the number of blocks, the sites being dealt out over
1, 2 and 8 devices, which is arithmetic and no measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from init_measure import ROLES, Peak, peft_factors, rates, timed, watched
from torch import nn

from corda_vlm.covariance import CovarianceStore, collect_covariance
from corda_vlm.plan import plan_adapter
from corda_vlm.sites import find_sites, get_linear
from corda_vlm.text_table import text_table

RANK = 128


@dataclass(frozen=True)
class Block:
    """What is measured of one kind of block.

    Attributes:
        blocks: how many the whole model has.
        width, inner, heads: of the block.
        batches, batch_size: of the calibration.
        length: tokens of a sample.
    """

    blocks: int
    width: int
    inner: int
    heads: int
    batches: int
    batch_size: int
    length: int
    rank: int = RANK


BLOCKS = {
    "llama-7b": Block(32, 4096, 11008, 32, batches=16, batch_size=8, length=64),
    "clip-l": Block(24, 1024, 4096, 16, batches=4, batch_size=4, length=577),
}
BLOCK_ROLES = {
    "llama-7b": [*ROLES, "gate"],
    "clip-l": ROLES,
}  # without the projection to embeddings
SMALL = {
    "llama-7b": Block(32, 64, 96, 2, batches=4, batch_size=4, length=16, rank=4),
    "clip-l": Block(24, 64, 96, 2, batches=4, batch_size=4, length=17, rank=4),
}


def build(name: str, block: Block, dtype: torch.dtype) -> nn.Module:
    """One block in a model of its real class; what is around it is as small as it can be."""
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": block.width,
        "intermediate_size": block.inner,
        "num_hidden_layers": 1,
        "num_attention_heads": block.heads,
    }
    if name == "llama-7b":
        from transformers import LlamaConfig, LlamaForCausalLM

        model: Any = LlamaForCausalLM(LlamaConfig(**size, vocab_size=4096))
        model.get_input_embeddings().weight.data = anisotropic(4096, block.width)
    else:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        side = round((block.length - 1) ** 0.5)
        config = CLIPVisionConfig(**size, image_size=14 * side, patch_size=14, projection_dim=32)
        model = CLIPVisionModelWithProjection(config)
    return model.to(dtype).eval()


def anisotropic(rows: int, width: int) -> torch.Tensor:
    """(rows, width) of a power-law spectrum, and a large mean in four channels."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1, width + 1) ** -0.5
    turn = torch.linalg.qr(torch.randn(width, min(width, 512), generator=generator)).Q
    x = torch.randn(rows, width, generator=generator) * scales
    x = x - (x @ turn) @ turn.T * 0.5  # so that the spectrum's directions are no channels
    x[:, torch.randperm(width, generator=generator)[:4]] += 3 * scales[0]
    return x


def inputs(name: str, block: Block, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    if name == "llama-7b":
        shape = (block.batch_size, block.length)
        return [
            {"input_ids": torch.randint(0, 4096, shape, generator=generator)}
            for _ in range(block.batches)
        ]
    side = 14 * round((block.length - 1) ** 0.5)
    shape = (block.batch_size, 3, side, side)
    return [
        {"pixel_values": torch.randn(shape, generator=generator).cumsum(-1).div(side**0.5).to(dtype)}
        for _ in range(block.batches)
    ]  # fmt: skip


def measure(name: str, block: Block, dtype: torch.dtype, peft: bool) -> dict[str, Any]:
    model = build(name, block, dtype)
    batches = inputs(name, block, dtype)
    sites = find_sites(model, roles=BLOCK_ROLES[name])
    stages: dict[str, float] = {}
    with torch.no_grad(), timed(stages, "forward"):
        for batch in batches:
            model(**batch)
    found: dict[str, Any] = {"stages": stages, "blocks": block.blocks, "peak_mb": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "covariance.safetensors"
        with Peak() as peak, timed(stages, "calibrate"):
            store = collect_covariance(
                model, batches, sites, path=path, blockwise=name == "llama-7b", show_progress=False
            )
        found["peak_mb"]["calibrate"] = peak.mb
        with Peak() as peak, timed(stages, "plan"):
            plan = plan_adapter(
                model,
                store,
                mode="kpm",
                rank=block.rank,
                roles=BLOCK_ROLES[name],
                show_progress=False,
            )
        found["peak_mb"]["plan"] = peak.mb
        found["flops"] = operations(
            store, {p.site.name: p.shape for p in plan.sites}, block.batches * block.batch_size
        )
        if peft:
            found["peft"] = decomposed_by_peft(model, store)
    return found


def operations(
    store: CovarianceStore, shapes: dict[str, tuple[int, int]], samples: int
) -> dict[str, dict[str, float]]:
    """Stage -> precision -> floating-point operations that it does not go without; see the module."""
    widths = {site.stream: (shapes[site.name][1], sum(store.counts(site.name))) for site in store.sites}  # fmt: skip
    factors = 0.0
    for out, inp in shapes.values():
        n, m = min(out, inp), max(out, inp)
        factors += 2 * n**3 / 3 if n == m else m * n**2 + n**3 / 3
    return {
        "calibrate": {"float32": float(sum(tokens * d**2 for d, tokens in widths.values()))},
        "plan": {
            "float64": sum(d**3 / 3 for d, _ in widths.values()) + factors,
            "float32": float(sum(2 * min(out, inp) * inp**2 for out, inp in shapes.values())),
        },
    }


def decomposed_by_peft(model: nn.Module, store: CovarianceStore) -> dict[str, float]:
    """PEFT's decomposition of the same layers, from the same covariances."""
    from peft import LoraConfig
    from peft.tuners.lora import corda

    stages: dict[str, float] = {}
    peaks = []
    for name in store:
        layer: Any = nn.Linear(1, 1, bias=False)
        layer.weight = nn.Parameter(get_linear(model, name).weight.detach().float(), False)
        layer.covariance_matrix = store[name].matrix.float()
        with Peak() as peak, watched({}), timed(stages, "plan"):
            layer.eigens = corda.collect_eigens_for_layer(layer, LoraConfig())
        peaks.append(peak.mb)
        peft_factors(layer, slice(0, 1))
    return {**stages, "peak_mb": max(peaks)}


def report(results: dict[str, Any]) -> str:
    """The tables, from the medians of what was measured."""
    rates_of, rows, whole = results["gflops"], [], []
    for name, runs in results["blocks"].items():
        stages = {s: statistics.median(r["stages"][s] for r in runs) for s in runs[0]["stages"]}
        flops, peft = runs[0]["flops"], [r["peft"] for r in runs if "peft" in r]
        for stage in ("calibrate", "plan"):
            floor = sum(n / rates_of[kind] / 1e9 for kind, n in flops[stage].items())
            floor += stages["forward cpu"] if stage == "calibrate" else 0.0
            peak = statistics.median(r["peak_mb"][stage] for r in runs)
            beside = peft[0]["plan cpu"] if peft and stage == "plan" else None
            cpu = stages[f"{stage} cpu"]
            rows.append([
                name, stage, f"{stages[stage]:.1f}", f"{cpu:.1f}", f"{floor:.1f}",
                f"{cpu / floor:.2f}", f"{peak:.0f}", "" if beside is None else f"{beside:.0f}",
            ])  # fmt: skip
        blocks = runs[0]["blocks"]
        seconds = blocks * stages["calibrate cpu"], blocks * stages["plan cpu"]
        whole.append([name, blocks, *(f"{sum(seconds) / n / 60:.1f}" for n in (1, 2, 8))])
    head = [
        "block",
        "stage",
        "seconds",
        "CPU",
        "floor",
        "of floor",
        "peak MB",
        "PEFT's decomposition, CPU",
    ]
    return "\n\n".join([
        text_table(rows, head, right=(False, False, *[True] * 6)),
        text_table(whole, ["model", "blocks", *(f"{n} device(s), minutes" for n in (1, 2, 8))], right=(False, *[True] * 4)),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--block", choices=list(BLOCKS), nargs="+", default=list(BLOCKS))
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the model"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="of each block, default 3; PEFT is measured once"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--peft", action="store_true", help="measure PEFT's decomposition of the same layers too"
    )
    parser.add_argument("--small", action="store_true", help="tiny blocks, one run each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    blocks, dtype = SMALL if args.small else BLOCKS, getattr(torch, args.dtype)
    if args.one:
        print(json.dumps(measure(args.one, blocks[args.one], dtype, args.peft)))
        return
    results: dict[str, Any] = {**rates(args.small), "threads": args.threads, "dtype": args.dtype}
    results["blocks"] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.block:
        for repeat in range(1 if args.small else args.repeats):
            run = in_a_process(name, args, peft=args.peft and repeat == 0)
            results["blocks"].setdefault(name, []).append(run)
            (args.out / "scale_7b.json").write_text(json.dumps(results, indent=1) + "\n")
    print(report(results))


def in_a_process(name: str, args: argparse.Namespace, *, peft: bool) -> dict[str, Any]:
    """Measure one block in a fresh process, so that no memory of others counts."""
    command = [sys.executable, __file__, "--out", str(args.out), "--one", name]
    command += ["--dtype", args.dtype, "--threads", str(args.threads)]
    command += ["--small"] * args.small + ["--peft"] * peft
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **limits}
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
