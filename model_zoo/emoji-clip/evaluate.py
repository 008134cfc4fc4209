"""Measure the weights in this folder on drawings they never saw, with plain open_clip.

::

    python model_zoo/emoji-clip/evaluate.py

Zero-shot classification among the labels of all 1,644 emoji, on the held-out pairs of the eight
trained styles and on OpenMoji, a style that was never trained. Prints both and writes metrics.json.
With ``--split val`` it scores the pairs that hyper-parameters were chosen on, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from train import MEAN, STD, STYLES, Drawings, Emoji, read_drawings, read_emoji

HERE = Path(__file__).resolve().parent
UNSEEN_STYLE = "openmoji"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": model,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }


@torch.inference_mode()
def classifier(model: Any, tokenizer: Any, emoji: list[Emoji], templates: list[str]) -> Tensor:
    """The zero-shot classifier over all labels, (embed, classes): open_clip's own builder."""
    return open_clip.build_zero_shot_classifier(
        model,
        tokenizer,
        [e.label for e in emoji],
        [template.format for template in templates],
        num_classes_per_batch=128,
    )


@torch.inference_mode()
def hits(model: Any, drawings: Drawings, weights: Tensor) -> Tensor:
    """Whether the right class is first, and among the first five: (n, 2) bool."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    found = []
    for images, own in zip(
        drawings.images.split(256), drawings.emoji_index.split(256), strict=True
    ):
        pixels = (images.float() / 255.0 - mean) / std
        scores = F.normalize(model.encode_image(pixels), dim=-1) @ weights  # (b, classes)
        right = scores.topk(5, dim=1).indices == own[:, None]
        found.append(torch.stack([right[:, 0], right.any(1)], dim=1))
    return torch.cat(found)


def score(right: Tensor, seed: int = 0, resamples: int = 1000) -> dict[str, Any]:
    """Top-1 and top-5 with 95 % bootstrap intervals, rounded to a ten-thousandth."""
    draws = torch.randint(
        len(right), (resamples, len(right)), generator=torch.Generator().manual_seed(seed)
    )
    means = right.float()[draws].mean(1).quantile(torch.tensor([0.025, 0.975]), dim=0)
    result: dict[str, Any] = {"n": len(right)}
    for column, name in enumerate(("top1", "top5")):
        result[name] = round(right[:, column].float().mean().item(), 4)
        result[f"{name}_interval"] = [round(bound, 4) for bound in means[:, column].tolist()]
    return result


def evaluate(directory: Path, data_dir: Path, split: str = "heldout") -> dict[str, Any]:
    """All scores of the weights in `directory`."""
    name = f"local-dir:{directory}"
    model, _, _ = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    templates = yaml.safe_load((HERE / "card.yaml").read_text(encoding="utf-8"))["templates"]
    emoji = read_emoji(data_dir)
    weights = classifier(model, tokenizer, emoji, templates)
    scores: dict[str, Any] = {"classes": len(emoji), "templates": templates}
    per_style = {
        style: hits(model, read_drawings(data_dir, (style,), split, emoji), weights)
        for style in STYLES
    }
    scores[split] = score(torch.cat(list(per_style.values())))
    scores["per_style"] = {style: score(right) for style, right in per_style.items()}
    if split == "heldout":
        unseen = read_drawings(data_dir, (UNSEEN_STYLE,), UNSEEN_STYLE, emoji)
        scores[UNSEEN_STYLE] = score(hits(model, unseen, weights))
    return scores


def main() -> None:
    """Score, print, and write metrics.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--split", choices=("heldout", "val"), default="heldout")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--training", type=Path, help="train.py's --out, to copy how it was trained"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    scores = evaluate(arguments.model, arguments.data, arguments.split)
    for name in (arguments.split, UNSEEN_STYLE):
        if name in scores:
            one = scores[name]
            print(f"{name:28} top-1 {one['top1']:6.1%}  top-5 {one['top5']:6.1%}  n={one['n']}")
    for style, one in scores["per_style"].items():
        print(f"  {style:26} top-1 {one['top1']:6.1%}  top-5 {one['top5']:6.1%}  n={one['n']}")
    if arguments.split != "heldout":
        return
    out = arguments.model / "metrics.json"
    old = json.loads(out.read_text()) if out.exists() else {}
    training = old.get("training")
    if arguments.training:
        lines = (arguments.training / "log.jsonl").read_text().splitlines()
        last = [record for line in lines if "val_top1" in (record := json.loads(line))][-1]
        options = json.loads((arguments.training / "options.json").read_text())
        training = {
            "command": "python model_zoo/emoji-clip/train.py --out runs/emoji-clip",
            "options": options,
            "samples": last["samples"],
            "wall_minutes": round(last["minutes"], 1),
            "val_top1": last["val_top1"],
            "val_top5": last["val_top5"],
        }
    metrics = scores | {
        "bootstrap_seed": 0,
        "command": "python model_zoo/emoji-clip/evaluate.py",
        "machine": machine() | {"threads": arguments.threads},
        "evaluation_seconds": round(time.monotonic() - started, 1),
        "training": training,
    }
    out.write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main()
