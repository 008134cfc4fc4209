"""The measurements of init_vs_peft.py: each function does one, in a process of its own."""

from __future__ import annotations

import io
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RANK = 16
# what `decompose` takes beside, as our defaults have it
OURS: dict[str, Any] = {"damping": 1e-4, "a_norm": None, "route": "auto", "seed": 0}
COMPONENTS: dict[str, Any] = {"kpm": "smallest", "ipm": "largest"}
TARGETS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "fc1",
    "fc2",
]  # transformers' CLIP, both towers
ROLES = ["q", "k", "v", "o", "up", "down"]  # the same, as corda_vlm names them
# Setting of ours -> (precision of the covariance's products, is the forward pass in bfloat16?)
SETTINGS: dict[str, Any] = {
    "float32": ("float32", False),
    "bf16": ("bf16", False),
    "bf16-forward": ("bf16", True),
}
DAMPINGS = (1e-2, 1e-4)  # PEFT's, which is timed; and our default
PHOTOS = "caltech101_train_10perclass_224.parquet"


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        part: "clip", "layers" or "rates".
        tool: "peft" or "ours".
        mode: "kpm", "ipm", or "both" where the tool does the same work for either.
        setting: of ours, key of `SETTINGS`.
        shape: (out, inp) of the layer, in part "layers".
        quick: tiny sizes.
        batch_size: of our calibration.
    """

    part: str
    tool: str = ""
    mode: str = ""
    setting: str = "float32"
    shape: tuple[int, int] = (0, 0)
    repeat: int = 0
    quick: bool = False
    batch_size: int = 32

    @property
    def key(self) -> str:
        """The name of its file."""
        if self.part == "rates":
            return "rates"
        what = "x".join(map(str, self.shape)) if self.part == "layers" else self.setting
        return f"{self.part}_{self.tool}_{what}_{self.mode}_{self.repeat}"

    @property
    def judged(self) -> bool:
        """Energies are the same in every repeat."""
        return self.repeat == 0


def work(task: Task) -> dict[str, Any]:
    if task.part == "rates":
        return rates(task.quick)
    if task.part == "layers":
        return layer_peft(task) if task.tool == "peft" else layer_ours(task)
    model = build_clip(task.quick)
    data = calibration(model, 4 if task.quick else 64)
    return clip_peft(task, model, data) if task.tool == "peft" else clip_ours(task, model, data)


def rates(quick: bool) -> dict[str, Any]:
    """GFLOP a CPU second of large products on this machine: what the floor is counted with."""
    n = 256 if quick else 2048
    found = {}
    for name, dtype in (
        ("float32", torch.float32),
        ("float64", torch.float64),
        ("bf16", torch.bfloat16),
    ):
        x = torch.randn(n, n).to(dtype)
        x @ x
        times = []
        for _ in range(5):
            started = time.process_time()
            x @ x
            times.append(time.process_time() - started)
        found[name] = 2 * n**3 / statistics.median(times) / 1e9
    return {"gflops": found, "machine": machine()}


def machine() -> dict[str, str]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"cpu": cpu, "python": platform.python_version(), **packages}


# ---- measuring -----------------------------------------------------------------------------------------


class Peak:
    """Highest memory of the process's own during a block, above that at its start, in MB; sampled every 2 ms.

    Pages of files, such as torch's libraries, do not count: the system drops them and reads them again as it likes, which
    changes a resident size by hundreds of MB.
    """

    def __enter__(self) -> Peak:
        self._stop = threading.Event()
        self._start = self._highest = own_memory()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, own_memory())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.mb = (max(self._highest, own_memory()) - self._start) / 1e6


def own_memory() -> int:
    """Bytes of resident memory that are no pages of files; where the system does not tell, all that is resident."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("RssAnon:")[1].split()[0]) * 1024
    import psutil

    return psutil.Process().memory_info().rss


@contextmanager
def timed(stages: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to `stages[name]`, and its processor seconds to `stages[name + " cpu"]`.

    On a machine with other work the second number is the steadier one.
    """
    started, started_cpu = time.perf_counter(), time.process_time()
    yield
    stages[name] = stages.get(name, 0.0) + time.perf_counter() - started
    cpu = f"{name} cpu"
    stages[cpu] = stages.get(cpu, 0.0) + time.process_time() - started_cpu


# ---- (a) a whole CLIP ----------------------------------------------------------------------------------


def build_clip(quick: bool) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = (
        CLIPConfig(
            text_config=dict(small), vision_config={**small, "image_size": 64, "patch_size": 16}
        )
        if quick
        else CLIPConfig()  # the defaults are ViT-B/32
    )
    return CLIPModel(config).eval()


def calibration(model: Any, count: int) -> dict[str, Tensor]:
    """`pixel_values` (n, 3, H, W) and `input_ids` (n, 77) without padding, so that both tools see the same tokens."""
    size = model.config.vision_config.image_size
    folder = os.environ.get("CORDA_VLM_DATA")
    if folder:
        images, names = photos(Path(folder) / PHOTOS, count, size)
    else:
        images, names = drawn(count, size), [f"pattern number {i}" for i in range(101)]
    return {"pixel_values": images, "input_ids": captions(names, count)}


def photos(path: Path, count: int, size: int) -> tuple[Tensor, list[str]]:
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(path, columns=["image", "class_name"])
    step = table.num_rows / count
    rows = [int(i * step) for i in range(count)]  # spread over the classes
    pixels = []
    for row in rows:
        image = (
            Image.open(io.BytesIO(table["image"][row].as_py())).convert("RGB").resize((size, size))
        )
        pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return (torch.stack(pixels) - mean) / std, sorted(set(table["class_name"].to_pylist()))


def drawn(count: int, size: int) -> Tensor:
    """Images with the 1/f spectrum of photos, of correlated colours."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.fft.rfft2(torch.randn(count, 3, size, size, generator=generator))
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None])
    images = torch.fft.irfft2(noise / frequency.clamp_min(1 / size), s=(size, size))
    images = images + 2 * images.mean(1, keepdim=True)
    return images / images.std()


def captions(names: list[str], count: int) -> Tensor:
    """CLIP's tokens of sentences about `names`, cut to fill the context of 77."""
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(count):
        order = torch.randperm(len(names), generator=generator)[:30].tolist()
        texts.append(" ".join(f"a photo of a {names[i].replace('_', ' ')}." for i in order))
    return tokenizer(texts)


def clip_peft(task: Task, model: nn.Module, data: dict[str, Tensor]) -> dict[str, Any]:
    from peft import LoraConfig
    from peft.tuners.lora import corda
    from peft.tuners.lora.config import CordaConfig

    mode: Any = task.mode
    config = LoraConfig(
        init_lora_weights="corda",
        target_modules=TARGETS,
        r=RANK,
        # the temporary fields hold the covariances, which are judged afterwards
        corda_config=CordaConfig(corda_method=mode, prune_temporary_fields=False),
    )
    count = len(data["input_ids"])

    def run_model() -> None:
        for i in range(count):
            model(**{name: value[i : i + 1] for name, value in data.items()})

    stages: dict[str, float] = {}
    with Peak() as peak, watched(stages) as damping_of, timed(stages, "total"):
        corda.preprocess_corda(model, config, run_model)
    with torch.no_grad(), timed(stages, "forward"):
        run_model()
    result = {"stages": stages, "peak_mb": peak.mb, "batch_size": 1}
    if task.judged:
        layers: Any = corda.target_modules(
            model, config
        )  # PEFT annotates what it yields as a module
        result["sites"] = [
            judge_layer(
                name,
                m.weight.detach(),
                m.covariance_matrix,
                damping_of[m],
                peft_factors(m),
                task.mode,
            )
            for name, m in layers
        ]
    return result


@contextmanager
def watched(stages: dict[str, float]) -> Iterator[dict[nn.Module, float]]:
    """Time PEFT's two stages, and yield the damping it ends with, by layer.

    PEFT starts at 0.01 and doubles it before every further inverse.
    """
    from peft.tuners.lora import corda

    inverses, final = 0, {}
    inverse, collect, decompose, decompose_layer = (
        torch.linalg.inv,
        corda.calib_cov_distribution,
        corda.collect_eigens,
        corda.collect_eigens_for_layer,
    )

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal inverses
        inverses += 1
        return inverse(*args, **kwargs)

    def layer(linear: nn.Module, config: Any) -> Any:
        nonlocal inverses
        inverses = 0
        eigens = decompose_layer(linear, config)
        final[linear] = 0.01 * 2 ** (inverses - 1)
        return eigens

    def stage(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def staged(*args: Any, **kwargs: Any) -> Any:
            with timed(stages, name):
                return function(*args, **kwargs)

        return staged

    torch.linalg.inv, corda.collect_eigens_for_layer = counted, layer
    corda.calib_cov_distribution = stage(collect, "collection")
    corda.collect_eigens = stage(decompose, "decomposition")
    try:
        yield final
    finally:
        torch.linalg.inv, corda.collect_eigens_for_layer = inverse, decompose_layer
        corda.calib_cov_distribution, corda.collect_eigens = collect, decompose


def peft_factors(module: Any, chosen: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """(B, A) as PEFT's `corda_init` makes them."""
    root = module.eigens.S_WC[chosen].sqrt()
    return module.eigens.U_WC[:, chosen] * root, root[:, None] * module.eigens.V_WC[:, chosen].T


def clip_ours(task: Task, model: Any, data: dict[str, Tensor]) -> dict[str, Any]:
    from corda_vlm.covariance import collect_covariance
    from corda_vlm.plan import plan_adapter
    from corda_vlm.sites import find_sites

    precision, bf16_forward = SETTINGS[task.setting]
    parts = [value.split(task.batch_size) for value in data.values()]
    batches = [dict(zip(data, part, strict=True)) for part in zip(*parts, strict=True)]
    sites = find_sites(model, roles=ROLES)

    def forward(model: nn.Module, batch: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16_forward):
            model(**batch)

    stages: dict[str, float] = {}
    quiet: dict[str, Any] = {"show_progress": False}
    options = {"mode": task.mode, "rank": RANK, "roles": ROLES, **quiet}
    with Peak() as peak, timed(stages, "total"):
        with timed(stages, "collection"):
            store = collect_covariance(
                model, batches, sites, forward=forward, precision=precision, **quiet
            )
        with timed(stages, "decomposition"):
            plan = plan_adapter(model, store, damping=DAMPINGS[0], **options)
    with torch.no_grad(), timed(stages, "forward"):
        for batch in batches:
            forward(model, batch)
    shapes = {site.stream: planned.shape for site, planned in zip(sites, plan.sites, strict=True)}
    counts = {site.stream: sum(store.counts(site.name)) for site in sites}
    result: dict[str, Any] = {
        "stages": stages,
        "peak_mb": peak.mb,
        "batch_size": task.batch_size,
        "flops": {
            # half of the products of a symmetric matrix; a stream's width is that of any of its sites
            "covariance": sum(counts[s] * shape[1] ** 2 for s, shape in shapes.items()),
            "oriented": sum(2 * min(p.shape) * p.shape[1] ** 2 for p in plan.sites),
        },
    }
    if task.judged:
        reference = collect_covariance(model, batches, sites, precision="float64", **quiet)
        result["sites"] = []
        for damping in DAMPINGS:
            if damping != plan.damping:
                plan = plan_adapter(model, store, damping=damping, **options)
            for site in sites:
                factors, c = plan.factors[site.name], reference[site.name].matrix
                weight = model.get_submodule(site.name).weight.detach()
                entry = judge(weight, c, damping, {"ours": (factors.B, factors.A)}, task.mode)
                result["sites"].append({"name": site.name, "damping": damping, "damped": entry})
    return result


# ---- (b) single layers ---------------------------------------------------------------------------------


def build_layer(shape: tuple[int, int]) -> tuple[nn.Linear, Tensor]:
    """A layer and the second moment of its inputs: power-law spectra, a large mean in a few channels."""
    out, inp = shape
    generator = torch.Generator().manual_seed(0)
    variances = torch.arange(1, inp + 1, dtype=torch.float32) ** -1.0
    covariance = _mix(_mix(torch.diag(variances), 1).T.contiguous(), 1)
    mean = 0.01 * torch.randn(inp, generator=generator)
    mean[torch.randperm(inp, generator=generator)[:4]] = 3.0
    covariance.addr_(mean, mean)
    covariance = (covariance + covariance.T) / 2
    scales = torch.arange(1, inp + 1, dtype=torch.float32) ** -0.25
    layer = nn.Linear(inp, out, bias=False)
    weight = torch.randn(out, inp, generator=generator).mul_(scales / math.sqrt(inp))
    layer.weight = nn.Parameter(_mix(weight, 2), requires_grad=False)
    return layer, covariance


def _mix(x: Tensor, seed: int, block: int = 32) -> Tensor:
    """`x V` for a fixed dense rotation V: rotations of blocks, between permutations. No n³ work."""
    generator = torch.Generator().manual_seed(seed)
    rows, size = x.shape
    for _ in range(3):
        order = torch.randperm(size, generator=generator)
        turn = torch.linalg.qr(torch.randn(size // block, block, block, generator=generator)).Q
        x = torch.einsum("nbi,bij->nbj", x[:, order].view(rows, -1, block), turn).reshape(
            rows, size
        )
    return x


def layer_peft(task: Task) -> dict[str, Any]:
    from peft import LoraConfig
    from peft.tuners.lora import corda

    layer, covariance = build_layer(task.shape)
    layer.covariance_matrix = covariance  # type: ignore[assignment]
    stages: dict[str, float] = {}
    with Peak() as peak, watched({}) as damping_of, timed(stages, "total"):
        layer.eigens = corda.collect_eigens_for_layer(layer, LoraConfig())  # type: ignore[assignment]
    result: dict[str, Any] = {"stages": stages, "peak_mb": peak.mb}
    if task.judged:
        chosen = {"kpm": slice(-RANK, None), "ipm": slice(0, RANK)}
        weight, damping = layer.weight.detach(), damping_of[layer]
        factors = {mode: peft_factors(layer, part) for mode, part in chosen.items()}
        del layer.eigens
        result["sites"] = [
            judge_layer(mode, weight, covariance, damping, factors[mode], mode)
            for mode in COMPONENTS
        ]
    return result


def layer_ours(task: Task) -> dict[str, Any]:
    from corda_vlm.decompose import decompose

    layer, covariance = build_layer(task.shape)
    stages: dict[str, float] = {}
    with Peak() as peak, timed(stages, "total"):
        decompose(layer.weight, covariance, rank=RANK, components=COMPONENTS[task.mode], **OURS)  # type: ignore[arg-type]
    return {"stages": stages, "peak_mb": peak.mb}


# ---- judging -------------------------------------------------------------------------------------------


def judge_layer(
    name: str,
    weight: Tensor,
    covariance: Tensor,
    damping: float,
    peft: tuple[Tensor, Tensor],
    mode: str,
) -> dict[str, Any]:
    """Both tools' energies on PEFT's covariance, at PEFT's damping and under C without damping."""
    from corda_vlm.decompose import decompose

    asked: dict[str, Any] = {"rank": RANK, "components": COMPONENTS[mode]}
    ours = decompose(weight, covariance, **{**asked, **OURS, "damping": damping})
    # at the damping we recommend: what the knowledge itself, undamped, has to say about it
    light = decompose(weight, covariance, **{**asked, **OURS})
    factors = {"peft": peft, "ours": (ours.B, ours.A), "ours at 1e-4": (light.B, light.A)}
    return {
        "name": name,
        "damping": damping,
        "damped": judge(
            weight, covariance, damping, {k: factors[k] for k in ("peft", "ours")}, mode
        ),
        "undamped": judge(weight, covariance, 0.0, factors, mode),
    }


def judge(
    weight: Tensor,
    covariance: Tensor,
    damping: float,
    factors: dict[str, tuple[Tensor, Tensor]],
    mode: str,
) -> dict[str, float]:
    """`‖B A C'‖_F` of each, and of the best rank-r projection, all relative to `‖W C'‖_F`."""
    from corda_vlm.decompose import damp, knowledge_energy

    damped = damp(covariance.double(), damping)
    values = torch.linalg.svdvals(weight.double() @ damped)  # descending
    best = values[-RANK:] if mode == "kpm" else values[:RANK]
    whole = float(torch.linalg.norm(values))
    energies = {name: knowledge_energy(delta, damped) / whole for name, delta in factors.items()}
    return {"optimum": float(torch.linalg.norm(best)) / whole, **energies}
