"""What only an accelerator can show, in one run: is all of it right there, how long does it take at 7B's shapes, and in what memory.

    python eval/benchmarks/gpu.py --out runs/gpu.json     # on the accelerator that is there: ten minutes at most
    python eval/benchmarks/gpu.py --small                 # a tiny size, on a CPU too: does it run? Its times mean nothing

Four parts, each told as soon as it is there:

- correctness: second moments, covariances, plans and the paired layer's start on the device beside the same on the CPU, and, with several
  accelerators in sight, a model spread over them beside itself on one;
- calibration: the covariances of a block of LLaMA-2-7B's shapes with anisotropic inputs: tokens a second, and the sums' precision;
- init: the plan of that block, site by site, at rank 128, beside the same times 32 blocks;
- training: a step of the paired layer (untouched and residual) beside one of PEFT's LoRA, taking turns, with the peak of memory of each.

Times are wall-clock seconds between synchronizations of the device, the median of several where that fits the ten minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from corda_vlm.adapter import attach_adapter
from corda_vlm.covariance import CovarianceStore, SecondMoment, collect_covariance
from corda_vlm.decompose import knowledge_energy
from corda_vlm.plan import AdapterPlan, plan_adapter
from corda_vlm.sites import get_linear
from corda_vlm.text_table import text_table

BLOCKS_OF_7B = 32


@dataclass(frozen=True)
class Size:
    """The shapes of a run.

    Attributes:
        tokens: of the calibration, in batches of `length` times `batch`.
        steps: of training.
    """

    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    rank: int = 128
    tokens: int = 65536
    batch: int = 8
    length: int = 512
    steps: int = 15


SMALL = Size(hidden=32, intermediate=48, heads=4, rank=4, tokens=256, batch=2, length=16, steps=3)


class Device:
    """The accelerator that is there, or the CPU."""

    def __init__(self, name: str | None = None) -> None:
        kinds = [kind for kind in ("cuda", "xpu", "mps") if _has(kind)]
        self.torch = torch.device(name or (kinds[0] if kinds else "cpu"))
        self._module: Any = getattr(torch, self.torch.type, None)

    @property
    def name(self) -> str:
        if self.torch.type == "cuda":
            return torch.cuda.get_device_name(self.torch)
        return self.torch.type

    @property
    def count(self) -> int:
        return self._module.device_count() if self.torch.type in ("cuda", "xpu") else 1

    def wait(self) -> None:
        if self.torch.type != "cpu":
            self._module.synchronize()

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds, and what the work gave."""
        self.wait()
        began = time.perf_counter()
        made = work()
        self.wait()
        return time.perf_counter() - began, made

    def peak(self, work: Callable[[], Any]) -> tuple[float | None, Any]:
        """The most memory (GB) above what is there before; None where the device does not tell."""
        if self.torch.type not in ("cuda", "xpu"):
            return None, work()
        self._module.empty_cache()
        self._module.reset_peak_memory_stats()
        before = self._module.memory_allocated()
        made = work()
        return (self._module.max_memory_allocated() - before) / 1e9, made


def _has(kind: str) -> bool:
    if kind == "mps":
        return torch.backends.mps.is_available()
    return hasattr(torch, kind) and getattr(torch, kind).is_available()


def blocks(size: Size, count: int, dtype: torch.dtype) -> Any:
    """So many blocks of these shapes, with random weights and inputs whose directions differ by three powers of ten."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024, hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=count,
            num_attention_heads=size.heads, num_key_value_heads=size.heads, max_position_embeddings=size.length,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(torch.logspace(0, -3, size.hidden))
    return model.to(dtype).eval()


def batches(size: Size, count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 1024, (size.batch, size.length), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return made


def collected(model: nn.Module, given: list[Any], **options: Any) -> CovarianceStore:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return collect_covariance(model, given, show_progress=False, **options)


# ------------------------------------------------------------------ the parts


def correctness(device: Device) -> dict[str, float]:
    """How far the device departs from the CPU, as shares; each has a limit in `LIMITS`."""
    found: dict[str, float] = {}
    rows = torch.randn(4096, 192) * torch.logspace(0, -3, 192) + 3.0
    exact = (rows.double().T @ rows.double()) / len(rows)
    for precision in ("float32", "float64"):
        moment = SecondMoment(192, getattr(torch, precision), _sums_on(device, precision))
        for chunk in rows.split(512):
            moment.add(chunk.to(device.torch), precision)
        found[f"moment {precision}"] = _apart(moment.matrix().cpu(), exact)
    apart = SecondMoment(192, torch.float32, "cpu")  # as `collect_covariance(device="cpu")` has it
    for chunk in rows.split(512):
        apart.add(chunk.to(device.torch))
    found["moment, sums on the CPU"] = _apart(apart.matrix(), exact)
    model, given = blocks(SMALL, 2, torch.float32), batches(SMALL, 4)
    here = collected(model, given)
    plan_here = plan_adapter(model, here, rank=4, show_progress=False)
    there_model = copy.deepcopy(model).to(device.torch)
    there = collected(there_model, given)
    plan_there = plan_adapter(there_model, there, rank=4, show_progress=False)
    found["covariances"] = max(_apart(there[s].matrix.cpu(), here[s].matrix) for s in here)
    found["adapted energy"] = max(_energy_apart(model, here, plan_here, plan_there))
    for base in ("untouched", "residual"):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"start, {base}, {str(dtype).removeprefix('torch.')}"
            found[name] = _start_apart(there_model.to(dtype), plan_there, base, device)
            there_model.to(torch.float32)
    if device.count > 1:
        found["over several devices"] = _spread_apart(model, given, here, device)
    return found


LIMITS = {
    "moment float32": 1e-5, "moment float64": 1e-6, "moment, sums on the CPU": 1e-5, "covariances": 1e-3, "adapted energy": 1e-2,
    "start, untouched, float32": 0.0, "start, untouched, bfloat16": 0.0, "start, residual, float32": 1e-4,
    "start, residual, bfloat16": 5e-2, "over several devices": 1e-3,
}  # fmt: skip
"""The most that each may be off. An untouched base starts exactly where the model was; a residual one rounds."""


def _sums_on(device: Device, precision: str) -> torch.device:
    no_float64 = device.torch.type == "mps"  # and the means are float64
    return torch.device("cpu") if no_float64 else device.torch


def _apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).abs().max() / exact.double().diagonal().mean())


def _energy_apart(
    model: nn.Module, store: CovarianceStore, one: AdapterPlan, other: AdapterPlan
) -> list[float]:
    """Of each site, how much the energy of what is adapted differs, as a share of the weight's."""
    found = []
    for name, factor in one.factors.items():
        covariance = store[name].matrix
        weight = get_linear(model, name).weight.detach().double()
        whole = float(((weight @ covariance) * weight).sum()) ** 0.5
        pair = [knowledge_energy((f.B, f.A), covariance) for f in (factor, other.factors[name])]
        found.append(abs(pair[0] - pair[1]) / whole)
    return found


@torch.no_grad()
def _start_apart(model: nn.Module, plan: AdapterPlan, base: str, device: Device) -> float:
    """How far the outputs are from the model's, right after the adapter was attached."""
    batch = {name: value.to(device.torch) for name, value in batches(SMALL, 1)[0].items()}
    before = model(**batch).logits.float()
    adapted = attach_adapter(copy.deepcopy(model), plan, base=base)  # pyright: ignore[reportArgumentType]
    after = adapted(**batch).logits.float()
    return float((after - before).norm() / before.norm())


def _spread_apart(
    model: nn.Module, given: list[Any], here: CovarianceStore, device: Device
) -> float:
    """The covariances of a model whose second block is on another accelerator."""
    from accelerate import dispatch_model

    first, second = f"{device.torch.type}:0", f"{device.torch.type}:1"
    where: dict[str, Any] = {
        "model.embed_tokens": first,
        "model.layers.0": first,
        "model.layers.1": second,
    }
    where |= {"model.norm": second, "model.rotary_emb": first, "lm_head": second}
    spread = dispatch_model(copy.deepcopy(model), device_map=where)
    store = collected(spread, given)
    return max(_apart(store[s].matrix.cpu(), here[s].matrix) for s in here)


def calibration(device: Device, size: Size, dtype: torch.dtype) -> tuple[dict[str, Any], Any]:
    """The covariances of one block, in float32 and in reduced precision."""
    model = blocks(size, 1, dtype).to(device.torch)
    given = batches(size, max(1, size.tokens // (size.batch * size.length)))
    tokens = len(given) * size.batch * size.length
    found: dict[str, Any] = {"tokens": tokens}
    store = None
    for precision in ("float32", "bf16"):
        collected(model, given[:1], precision=precision)  # warms up
        peak, (seconds, sums) = device.peak(
            lambda p=precision: device.timed(lambda: collected(model, given, precision=p))
        )
        with torch.no_grad():
            plain = _forward(device, model, given)
        found[precision] = {
            "seconds": seconds,
            "forward alone": plain,
            "tokens a second": tokens / seconds,
            "peak GB": peak,
            "32 blocks, seconds": seconds * BLOCKS_OF_7B,
        }
        store = store or sums
    return found, (model, store)


def _forward(device: Device, model: nn.Module, given: list[Any]) -> float:
    def run() -> None:
        for batch in given:
            model(**{name: value.to(device.torch) for name, value in batch.items()})

    return device.timed(run)[0]


def init(device: Device, size: Size, model: nn.Module, store: CovarianceStore) -> dict[str, Any]:
    """The plan of the block, for both modes."""
    found: dict[str, Any] = {}
    for mode in ("kpm", "ipm"):
        peak, (seconds, plan) = device.peak(
            lambda m=mode: device.timed(
                lambda: plan_adapter(model, store, rank=size.rank, mode=m, show_progress=False)
            )
        )
        found[mode] = {
            "seconds": seconds,
            "sites": len(plan.sites),
            "peak GB": peak,
            "32 blocks, seconds": seconds * BLOCKS_OF_7B,
        }
    return found


KINDS = ("peft lora", "untouched", "residual")


def training(
    device: Device, size: Size, dtype: torch.dtype, model: nn.Module, plan: AdapterPlan
) -> dict[str, Any]:
    """Seconds a step of each kind, the ratio to PEFT's LoRA of the same turn, and the peak of memory."""
    batch = {name: value.to(device.torch) for name, value in batches(size, 1)[0].items()}
    batch["labels"] = batch["input_ids"]
    of = {kind: _adapted(kind, model, plan, size.rank) for kind in KINDS}
    steps = {kind: _step_of(one, batch, device, dtype) for kind, one in of.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    peaks = {kind: device.peak(step)[0] for kind, step in steps.items()}  # and warms up
    for _ in range(size.steps):
        for kind, step in steps.items():
            seconds[kind].append(device.timed(step)[0])
    lora = seconds["peft lora"]
    return {
        kind: {
            "seconds": statistics.median(seconds[kind]),
            "ratio": statistics.median(a / b for a, b in zip(seconds[kind], lora, strict=True)),
            "peak GB": peaks[kind],
        }
        for kind in KINDS
    }


def _adapted(kind: str, model: nn.Module, plan: AdapterPlan, rank: int) -> nn.Module:
    own = copy.deepcopy(model)
    if kind == "peft lora":
        names = [name.rpartition(".")[2] for name in plan.factors]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(set(names)))
        return get_peft_model(own, config).train()  # pyright: ignore[reportArgumentType]
    return attach_adapter(own, plan, base=kind).train()  # pyright: ignore[reportArgumentType]


def _step_of(
    model: nn.Module, batch: dict[str, torch.Tensor], device: Device, dtype: torch.dtype
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        with torch.autocast(device.torch.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ------------------------------------------------------------------ the run


def run(device: Device, size: Size, dtype: torch.dtype) -> dict[str, Any]:
    """All parts; each is printed as soon as it is there."""
    began = time.perf_counter()
    results: dict[str, Any] = {
        "device": device.name, "accelerators": device.count, "torch": torch.__version__,
        "dtype": str(dtype), "size": asdict(size),
    }  # fmt: skip
    print(f"{device.name}, {device.count} of them, PyTorch {torch.__version__}, {dtype}\n")
    results["correctness"] = correctness(device)
    wrong = [what for what, off in results["correctness"].items() if not off <= LIMITS[what]]
    _told("off by", {what: {"share": off, "limit": LIMITS[what]} for what, off in results["correctness"].items()})  # fmt: skip
    results["calibration"], (model, store) = calibration(device, size, dtype)
    _told("calibration", {p: results["calibration"][p] for p in ("float32", "bf16")})
    results["init"] = init(device, size, model, store)
    _told("init", results["init"])
    plan = plan_adapter(model, None, method="pissa", rank=size.rank, show_progress=False)
    results["training"] = training(device, size, dtype, model, plan)
    _told("training", results["training"])
    results["seconds"] = time.perf_counter() - began
    results["wrong"] = wrong
    print(f"{results['seconds']:.0f} s in all; {'wrong: ' + ', '.join(wrong) if wrong else 'all within their limits'}")  # fmt: skip
    return results


def _told(what: str, rows: dict[str, dict[str, Any]]) -> None:
    headers = list(next(iter(rows.values())))
    lines = [
        [name, *("" if row[h] is None else f"{row[h]:.4g}" for h in headers)]
        for name, row in rows.items()
    ]
    print(text_table(lines, [what, *headers], [False, *[True] * len(headers)]), end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny size: does it run?")
    parser.add_argument("--device", help="e.g. cuda:1 or cpu; the accelerator that is there")
    parser.add_argument("--dtype", default="auto", help="of the model: float32 or bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    device = Device(args.device)
    on_cpu = device.torch.type == "cpu"
    if on_cpu and not args.small:
        parser.error("there is no accelerator here; --small runs at a tiny size on the CPU")
    auto = "float32" if on_cpu else "bfloat16"
    dtype = getattr(torch, auto if args.dtype == "auto" else args.dtype)
    results = run(device, SMALL if args.small else Size(), dtype)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))
    raise SystemExit(1 if results["wrong"] else 0)


if __name__ == "__main__":
    main()
