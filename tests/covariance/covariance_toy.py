"""A model small enough to look through, batches, and what its tests share.

Run as a script, this is the calibration that the kill tests kill.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from corda_vlm.covariance import CovarianceStore, collect_covariance
from corda_vlm.families import Family, Rule, detect_family, register_family
from corda_vlm.families.layers.attention import unpacked
from corda_vlm.sites import Site, find_sites, get_linear


class Toy(nn.Module):
    """Two layers that read one tensor, one that reads their product, and one on the pooled result."""

    def __init__(self, width: int = 6, vocabulary: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.a = nn.Linear(width, 2 * width)
        self.b = nn.Linear(width, 2 * width)
        self.c = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)  # (B, L, d)
        h = self.drop(self.a(x) * torch.sigmoid(self.b(x)))  # (B, L, 2d)
        return self.head((x + self.c(h))[:, 0])  # (B, 3)


def toy_forward(model: nn.Module, batch: dict) -> object:
    time.sleep(float(os.environ.get("TOY_SLEEP", "0")))
    return model(batch["input_ids"])


TOY = Family(
    name="toy",
    matches=lambda model: isinstance(model, Toy),
    rules=(
        Rule("[ab]", "text", "up", "in"),
        Rule("c", "text", "down", "mid"),
        Rule("head", "text", "proj", "head.in"),
    ),
    forward=toy_forward,
    masks=lambda batch: {"text": batch["mask"]} if "mask" in batch else {},
    classes=("Toy",),
    towers=lambda _: ("text",),
)


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy().eval()


def toy_batches(count: int, size: int = 4, length: int = 5, seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(0, 50, (size, length), generator=generator)}
        for _ in range(count)
    ]


def collect(model: nn.Module, batches: object, *args: object, **options: object) -> CovarianceStore:
    return collect_covariance(model, batches, *args, **{"show_progress": False, **options})  # type: ignore[arg-type]


def direct(model: nn.Module, batches: list[dict], names: list[str]) -> dict[str, torch.Tensor]:
    """Site -> all its input rows, float64; padding left out by hand."""
    family = detect_family(model)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    with unpacked(model), torch.no_grad():
        for batch in batches:
            mask = family.masks(batch)
            seen: dict[str, torch.Tensor] = {}
            handles = [
                get_linear(model, name).register_forward_hook(
                    lambda _, args, __, name=name, seen=seen: seen.update({name: args[0]})
                )
                for name in names
            ]
            family.forward(model, batch)
            for handle in handles:
                handle.remove()
            for site in find_sites(model):
                x = seen[site.name].double()
                keep = mask.get(site.tower)
                if keep is not None and x.dim() == 3 and x.shape[:2] == keep.shape:
                    x = torch.cat([x[i, keep[i]] for i in range(len(x))])
                rows[site.name].append(x.reshape(-1, x.shape[-1]))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def clip_batches(sizes: list[int], seed: int = 0, padded: bool = True) -> list[dict]:
    """Images and captions of 3 to 11 tokens, id 99 last, as the tiny models take them."""
    generator = torch.Generator().manual_seed(seed)
    batches, number = [], 0
    for size in sizes:
        ids = torch.randint(1, 97, (size, 12), generator=generator)
        mask = torch.ones(size, 12, dtype=torch.long)
        for row in range(size):
            end = 3 + (5 * number) % 9 if padded else 11
            ids[row, end], ids[row, end + 1 :], mask[row, end + 1 :] = 99, 0, 0
            number += 1
        pixels = torch.randn(size, 3, 32, 32, generator=generator)
        batches.append({"pixel_values": pixels, "input_ids": ids, "attention_mask": mask})
    return batches


def joined(batches: list[dict], size: int) -> list[dict]:
    """The same samples in batches of another size."""
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    count = len(next(iter(whole.values())))
    return [
        {key: value[i : i + size] for key, value in whole.items()} for i in range(0, count, size)
    ]


def same(a: CovarianceStore, b: CovarianceStore) -> bool:
    """Equal to the bit."""
    return list(a) == list(b) and all(
        torch.equal(x.matrix, y.matrix) and x.count == y.count
        for name in a
        for x, y in zip(a.rounds(name), b.rounds(name), strict=True)
    )


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


TOY_SITES = [
    Site("a", "text", None, "up", "in"),
    Site("b", "text", None, "up", "in"),
    Site("c", "text", None, "down", "mid"),
]


class Named(list):
    """Batches with a fingerprint."""

    fingerprint = "calibration-set-1"


def main(path: str) -> None:
    """Calibrate the toy model into `path`, saying how many batches are done before each forward pass."""
    register_family(TOY)
    file = Path(path)
    done = 0
    if file.exists():
        progress = CovarianceStore.load(file, unfinished=True).progress
        done = progress.batches if progress else 0
    print(done, flush=True)

    def forward(model: nn.Module, batch: dict) -> None:
        nonlocal done
        print(done, flush=True)
        done += 1
        toy_forward(model, batch)

    batches = Named(toy_batches(int(os.environ["TOY_BATCHES"])))
    collect(toy(), batches, path=file, forward=forward, checkpoint_share=1.0)


if __name__ == "__main__":
    main(sys.argv[1])
