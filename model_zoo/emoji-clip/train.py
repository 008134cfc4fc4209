"""Train emoji-clip from scratch: a CLIP of 14 M parameters, in little over an hour on a CPU thread.

::

    python model_zoo/emoji-clip/train.py --out runs/emoji-clip

What it learns: the drawing of an emoji in one of eight styles goes with its name, its tags and its
subgroup, and two drawings of one emoji go together. What makes that affordable on a CPU:

* every batch holds distinct emoji, each with two drawings in different styles and one caption, so the
  text tower runs once for two images and the two drawings are positives of each other;
* the images live in memory as one uint8 tensor and are augmented as whole batches;
* the two towers are written out as one compiled function over open_clip's own parameters
  (`encode_images`, `encode_texts`; evaluate.py uses plain open_clip, so a difference would show);
* only the few thousand tokens that captions use are trained; they are put back into the table of
  49,408 rows on export. The rows of unused tokens keep their initial values, as they would anyway.

The held-out pairs and OpenMoji are never read here; only the 'val' pairs are looked at.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import platform
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from corda_vlm.precision import takes_bf16

HERE = Path(__file__).resolve().parent
STYLES = (
    "noto",
    "noto-v1",
    "fluent-emoji",
    "fluent-emoji-flat",
    "fluent-emoji-high-contrast",
    "twemoji",
    "emojione",
    "emojione-monotone",
)
MEAN = STD = (0.5, 0.5, 0.5)
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {
        "image_size": 64,
        "patch_size": 16,
        "width": 192,
        "head_width": 64,
        "layers": 6,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 192,
        "heads": 3,
        "layers": 3,
    },
}
PREPROCESS_CONFIG: dict[str, Any] = {
    "mean": list(MEAN),
    "std": list(STD),
    "interpolation": "bicubic",
    "resize_mode": "squash",
}
HEADS = 3
# The words around a label. Evaluation uses the same few, so that none is new to the text tower.
TEMPLATES = (
    "{}",
    "an emoji of {}",
    "a drawing of {}",
    "the {} emoji",
    "a picture of {}",
    "a photo of a {}",
    "an icon of {}",
)


@dataclass(frozen=True)
class Options:
    """What decides the result. Written beside the weights."""

    steps: int = 4600
    # The rate follows a cosine that would end at `schedule_steps`, and from `cooldown_from` on goes
    # straight to zero at `steps`: the end can be set while the training runs, nothing before it changes.
    schedule_steps: int = 7000
    cooldown_from: int = 3000
    emoji_per_batch: int = 192
    drawings_per_emoji: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 300
    image_image_weight: float = 0.3
    image_image_scale: float = 12.0
    patches_kept: int = 12
    full_patches_from: float = 0.85
    ema_decay: float = 0.998
    seed: int = 0


@dataclass(frozen=True)
class Drawings:
    """All drawings of one split: images (n, 3, 64, 64) uint8, and the row of `emoji` of each."""

    images: Tensor
    emoji_index: Tensor


@dataclass(frozen=True)
class Emoji:
    """The text side of one emoji."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    subgroup: str


# ---------------------------------------------------------------------------------------------- data


def decode(data: bytes) -> Tensor:
    """One image as (3, 64, 64) uint8."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def read_emoji(data_dir: Path, styles: tuple[str, ...] = STYLES) -> list[Emoji]:
    """Every emoji that some trained style draws, sorted by code points: the classes of zero-shot."""
    found: dict[str, Emoji] = {}
    for style in styles:
        columns = ["hexcode", "label", "tags", "subgroup"]
        for row in pq.read_table(data_dir / f"{style}.parquet", columns=columns).to_pylist():
            found[row["hexcode"]] = Emoji(
                row["hexcode"], row["label"], tuple(row["tags"]), row["subgroup"]
            )
    return [found[hexcode] for hexcode in sorted(found)]


def read_drawings(
    data_dir: Path, styles: tuple[str, ...], split: str, emoji: list[Emoji]
) -> Drawings:
    """The drawings of one split in these styles."""
    row_of = {e.hexcode: i for i, e in enumerate(emoji)}
    images, index = [], []
    for style in styles:
        table = pq.read_table(data_dir / f"{style}.parquet", columns=["image", "hexcode", "split"])
        for row in table.to_pylist():
            if row["split"] == split and row["hexcode"] in row_of:
                images.append(decode(row["image"]))
                index.append(row_of[row["hexcode"]])
    if not images:
        raise ValueError(f"{data_dir}: no drawings of split {split!r} in {', '.join(styles)}")
    return Drawings(torch.stack(images), torch.tensor(index))


def write_caption(emoji: Emoji, draw: random.Random) -> str:
    """One of many ways to name an emoji; nine in ten hold its label."""
    tags = list(emoji.tags) or [emoji.label]
    kind = draw.random()
    if kind < 0.30:
        return emoji.label
    if kind < 0.60:
        return draw.choice(TEMPLATES).format(emoji.label)
    if kind < 0.75:
        return f"{emoji.label}, {', '.join(draw.sample(tags, min(2, len(tags))))}"
    if kind < 0.83:
        return f"{emoji.subgroup.replace('-', ' ')}: {emoji.label}"
    if kind < 0.90:
        return f"{draw.choice(tags)}, {emoji.label}"
    return draw.choice(TEMPLATES).format(" ".join(draw.sample(tags, min(3, len(tags)))))


# -------------------------------------------------------------------------------------- augmentation


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Batched augmentation, (B, 3, 64, 64) uint8 -> normalised float.

    The work is done on the inverted image, so that what moves in from outside is white paper and a
    colour transform leaves the paper white. No mirroring: arrows and hands mean their direction.
    Rows are in random order already, so "with probability p" is "the first p of the rows".
    """

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def spread(low: float, high: float) -> Tensor:
        return low + (high - low) * rand(batch)

    batch = images.shape[0]
    ink = 1.0 - images.float() / 255.0  # (B, 3, H, W)

    # Geometry: zoom, squeeze, turn, shear, shift.
    angle = torch.randn(batch, generator=generator) * 0.17
    zoom, squeeze = spread(-0.25, 0.32).exp(), spread(-0.14, 0.14).exp()
    cos, sin, shear = angle.cos(), angle.sin(), spread(-0.15, 0.15)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = zoom * squeeze * cos, zoom * (shear * cos - sin)
    theta[:, 1, 0], theta[:, 1, 1] = zoom * sin / squeeze, zoom * (shear * sin + cos)
    theta[:, :, 2] = rand(batch, 2) * 0.3 - 0.15
    grid = F.affine_grid(theta, list(ink.shape), align_corners=False)
    ink = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    # Outlines where brightness jumps: some styles are drawn with black lines, most are not.
    outlined, lines_only = int(0.30 * batch), int(0.07 * batch)
    part = ink[:outlined]
    lines = F.max_pool2d(part, 3, 1, 1) + F.max_pool2d(-part, 3, 1, 1)  # (b, 3, H, W)
    lines = (lines.amax(1, keepdim=True) * 2.5 - 0.35).clamp(0, 1)
    kept = torch.ones(outlined, 1, 1, 1)
    kept[:lines_only] = 0.0
    ink = torch.cat([torch.maximum(part * kept, lines), ink[outlined:]])

    # Some are blurred, some flattened to a few levels; other rows than the outlined ones, and a few too.
    start, stop = int(0.25 * batch), int(0.40 * batch)
    ink[start:stop] = F.avg_pool2d(ink[start:stop], 3, 1, 1)
    start, stop = int(0.40 * batch), int(0.50 * batch)
    ink[start:stop] = (ink[start:stop] * 4).round() / 4

    # Colour: hue turned, saturation from none to more than full, strength; a 3x3 matrix per image.
    grey = torch.full((3, 3), 1 / 3)
    swap = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue = torch.where(rand(batch) < 0.25, spread(-math.pi, math.pi), spread(-0.4, 0.4))[
        :, None, None
    ]
    saturation = torch.where(rand(batch) < 0.22, torch.zeros(batch), spread(0.3, 1.6))[
        :, None, None
    ]
    strength = spread(0.65, 1.25)[:, None, None]
    turn = (torch.eye(3) - grey) * hue.cos() + swap * hue.sin()
    matrix = strength * (grey + saturation * turn)  # (B, 3, 3)
    ink = (matrix @ ink.flatten(2)).view_as(ink)

    # Light on dark, paper that is not white, a little noise, a hole.
    inverted = (rand(batch) < 0.05)[:, None, None, None]
    ink = torch.where(inverted, 1.0 - ink, ink)
    tinted = (rand(batch) < 0.25).float()[:, None, None, None]
    ink = ink + tinted * rand(batch, 3, 1, 1) * 0.35 * (1.0 - ink.amax(1, keepdim=True)).clamp(0, 1)
    start = int(0.75 * batch)
    ink[start:] += torch.randn(ink[start:].shape, generator=generator) * 0.04
    side = torch.arange(64)
    height, width = spread(6, 26)[:, None], spread(6, 26)[:, None]
    top, left = spread(0, 58)[:, None], spread(0, 58)[:, None]
    hole_y = (side >= top) & (side < top + height)  # (B, 64)
    hole_x = (side >= left) & (side < left + width)
    hole = hole_y[:, None, :, None] & hole_x[:, None, None, :]
    hole = hole & (rand(batch) < 0.25)[:, None, None, None]
    ink = torch.where(hole, rand(batch, 3, 1, 1), ink)

    paper = 1.0 - ink.clamp(0, 1)
    return paper * 2.0 - 1.0  # the mean 0.5 and deviation 0.5 of MEAN and STD


# --------------------------------------------------------------------------------------------- model


def transformer(tokens: Tensor, blocks: Any, mask: Tensor | None) -> Tensor:
    """open_clip's residual attention blocks over `tokens` (B, L, D), with plain attention.

    For sequences of 16 the products of plain attention are faster, forward and backward, than the
    fused kernels of a CPU, and they compile into their surroundings.
    """
    for block in blocks:
        normed = block.ln_1(tokens)
        qkv = F.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias)  # (B, L, 3D)
        batch, length, _ = qkv.shape
        q, k, v = qkv.view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # (B, heads, L, d)
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5  # (B, heads, L, L)
        if mask is not None:
            scores = scores + mask
        mixed = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(batch, length, -1)
        tokens = tokens + block.attn.out_proj(mixed)
        tokens = tokens + block.mlp(block.ln_2(tokens))
    return tokens


def encode_images(visual: Any, images: Tensor, kept: Tensor | None) -> Tensor:
    """`visual(images)`, optionally with only the patches `kept` (B, n) of each image."""
    size = visual.patch_size[0]
    batch, side = images.shape[0], images.shape[-1] // size
    patches = images.view(batch, 3, side, size, side, size).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch, side * side, -1)  # (B, 16, 3*16*16)
    positions = visual.positional_embedding[1:].expand(batch, -1, -1)
    if kept is not None:  # dropping before the projection: what is dropped costs nothing
        patches = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[-1]))
        positions = positions.gather(1, kept[:, :, None].expand(-1, -1, positions.shape[-1]))
    tokens = F.linear(patches, visual.conv1.weight.flatten(1)) + positions
    first = (visual.class_embedding + visual.positional_embedding[0]).expand(batch, 1, -1)
    tokens = visual.ln_pre(torch.cat([first.to(tokens.dtype), tokens], dim=1))
    tokens = transformer(tokens, visual.transformer.resblocks, None)
    return visual.ln_post(tokens[:, 0]) @ visual.proj


def encode_texts(model: Any, texts: Tensor) -> Tensor:
    """`model.encode_text(texts)`: (B, 16) token numbers to (B, embed)."""
    tokens = model.token_embedding(texts) + model.positional_embedding
    tokens = transformer(tokens, model.transformer.resblocks, model.attn_mask)
    ends = tokens[torch.arange(len(texts)), texts.argmax(-1)]
    return model.ln_final(ends) @ model.text_projection


def contrastive_loss(
    model: Any,
    images: Tensor,
    texts: Tensor,
    kept: Tensor | None,
    weight: float,
    scale: float,
    bf16: bool,
) -> tuple[Tensor, Tensor]:
    """Symmetric CLIP loss of both drawings with the caption, plus drawing with drawing.

    `images` holds the first drawings of the n emoji and then the second ones. Returns the loss and
    the share of images whose own caption scores highest in the batch.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        image, text = encode_images(model.visual, images, kept), encode_texts(model, texts)
    image = F.normalize(image.float(), dim=-1)  # (2n, E)
    text = F.normalize(text.float(), dim=-1)  # (n, E)
    logits = model.logit_scale.exp() * image @ text.T  # (2n, n), too coarse in bf16
    own = torch.arange(len(texts))
    both = torch.cat([own, own])
    first, second = logits.chunk(2)
    loss = F.cross_entropy(logits, both) / 2
    loss = loss + (F.cross_entropy(first.T, own) + F.cross_entropy(second.T, own)) / 4
    drawn, redrawn = image.chunk(2)
    pairs = scale * drawn @ redrawn.T
    loss = loss + weight * (F.cross_entropy(pairs, own) + F.cross_entropy(pairs.T, own)) / 2
    return loss, (logits.argmax(1) == both).float().mean()


def build_model(seed: int, vocabulary: int | None = None) -> Any:
    """A fresh open_clip model; with `vocabulary`, its token table has only so many rows."""
    torch.manual_seed(seed)
    config = json.loads(json.dumps(MODEL_CONFIG))
    if vocabulary:
        config["text_cfg"]["vocab_size"] = vocabulary
    return open_clip.CLIP(**config)


def export(weights: dict[str, Tensor], used_tokens: Tensor, seed: int, directory: Path) -> None:
    """Write open_clip's local format: config and float16 weights, the whole token table again."""
    full = build_model(seed).state_dict()
    table = full["token_embedding.weight"].clone()
    table[used_tokens] = weights["token_embedding.weight"]
    tensors = {**weights, "token_embedding.weight": table}
    directory.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()}
    temporary = directory / "open_clip_model.safetensors.part"
    save_file(half, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # safetensors makes files that only their owner may read
    temporary.replace(directory / "open_clip_model.safetensors")
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG}
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ------------------------------------------------------------------------------------------ training


def save_checkpoint(
    out: Path, step: int, model: Any, average: dict[str, Tensor], optimizer: Any, seconds: float
) -> None:
    """Write everything to a new folder and rename it: a kill leaves the old or the new, never half."""
    temporary, final = out / "checkpoint.part", out / "checkpoint"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, temporary / "model.safetensors"
    )
    save_file({k: v.contiguous() for k, v in average.items()}, temporary / "average.safetensors")
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    (temporary / "progress.json").write_text(json.dumps({"step": step, "seconds": seconds}))
    old = out / "checkpoint.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    out: Path, model: Any, average: dict[str, Tensor], optimizer: Any
) -> tuple[int, float]:
    """Resume from `out`, also when the kill came between the two renames."""
    folder = out / "checkpoint"
    if not folder.exists():
        folder = out / "checkpoint.old"
    if not folder.exists():
        return 0, 0.0
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for name, tensor in load_file(folder / "average.safetensors").items():
        average[name].copy_(tensor)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    progress = json.loads((folder / "progress.json").read_text())
    return int(progress["step"]), float(progress["seconds"])


@torch.no_grad()
def validate(
    weights: dict[str, Tensor], model: Any, drawings: Drawings, labels: Tensor
) -> dict[str, float]:
    """Top-1 and top-5 of the averaged weights on the val pairs, among all labels."""
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(weights)
    text = F.normalize(encode_texts(model, labels), dim=-1)
    pixels = drawings.images.float() / 127.5 - 1.0
    image = F.normalize(encode_images(model.visual, pixels, None), dim=-1)
    model.load_state_dict(trained)
    best = (image @ text.T).topk(5, dim=1).indices == drawings.emoji_index[:, None]
    return {
        "val_top1": best[:, 0].float().mean().item(),
        "val_top5": best.any(1).float().mean().item(),
    }


def learning_rate(step: int, options: Options) -> float:
    """Warm-up, cosine, and a straight line to zero at the end."""
    start = options.cooldown_from
    warm = min(1.0, (step + 1) / options.warmup_steps)
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(step, start) / options.schedule_steps)
    left = min(1.0, (options.steps - step) / max(1, options.steps - start))
    return options.learning_rate * warm * cosine * left


class Batches:
    """Batch number i is a function of the seed and i alone, so a resumed run sees the same ones."""

    def __init__(self, drawings: Drawings, emoji: list[Emoji], options: Options) -> None:
        self.drawings, self.emoji, self.options = drawings, emoji, options
        self.tokenizer = open_clip.SimpleTokenizer(
            context_length=MODEL_CONFIG["text_cfg"]["context_length"]
        )
        self.rows_of: dict[int, list[int]] = {}
        for row, index in enumerate(drawings.emoji_index.tolist()):
            self.rows_of.setdefault(index, []).append(row)
        self.indices = sorted(self.rows_of)
        self.cache: dict[str, Tensor] = {}
        # Every caption is made of these words, and a token never crosses a word, so these are all.
        probe = random.Random(options.seed)
        texts = [write_caption(e, probe) for e in emoji for _ in range(40)]
        texts += [t.format(e.label) for e in emoji for t in TEMPLATES]
        texts += [f"{tag}, {tag} x:" for e in emoji for tag in e.tags]
        used = torch.cat(
            [self.tokenizer(texts[i : i + 512]).unique() for i in range(0, len(texts), 512)]
        )
        self.used_tokens = (
            used.unique()
        )  # sorted, so the end token stays the largest, as open_clip wants
        self.compact = torch.full((MODEL_CONFIG["text_cfg"]["vocab_size"],), -1)
        self.compact[self.used_tokens] = torch.arange(len(self.used_tokens))

    def tokens(self, texts: list[str]) -> Tensor:
        """Token numbers in the compact table, (n, 16)."""
        for text in texts:
            if text not in self.cache:
                self.cache[text] = self.compact[self.tokenizer([text])[0]]
                if (self.cache[text] < 0).any():
                    raise ValueError(f"{text!r} has a token that no caption has")
        return torch.stack([self.cache[text] for text in texts])

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """Drawings (2n, 3, 64, 64) uint8, captions (n, 16), and the generator for the rest."""
        seed = self.options.seed * 1_000_003 + step
        draw = random.Random(seed)
        chosen = draw.sample(self.indices, self.options.emoji_per_batch)
        pairs = []
        for index in chosen:
            rows = self.rows_of[index]
            pairs.append(draw.sample(rows, 2) if len(rows) > 1 else rows * 2)
        order = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        texts = self.tokens([write_caption(self.emoji[index], draw) for index in chosen])
        return self.drawings.images[order], texts, torch.Generator().manual_seed(seed)


def train(options: Options, data_dir: Path, out: Path, *, compiled: bool, threads: int) -> None:
    """Train, resuming from `out` if it has a checkpoint, and export the averaged weights to `out`."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    emoji = read_emoji(data_dir)
    batches = Batches(read_drawings(data_dir, STYLES, "train", emoji), emoji, options)
    val = read_drawings(data_dir, STYLES, "val", emoji)
    labels = batches.tokens([e.label for e in emoji])

    model = build_model(options.seed, len(batches.used_tokens))
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), fused=True)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step, seconds = load_checkpoint(out, model, average, optimizer)
    settings = asdict(options) | {
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": threads,
    }
    (out / "options.json").write_text(json.dumps(settings, indent=2) + "\n")
    log = (out / "log.jsonl").open("a")

    def write(record: dict[str, Any]) -> None:
        log.write(json.dumps({k: round(v, 5) for k, v in record.items()}) + "\n")
        log.flush()
        print(record, flush=True)

    bf16 = takes_bf16("auto", "cpu")
    loss_of = torch.compile(contrastive_loss, dynamic=False) if compiled else contrastive_loss
    parameters = list(model.parameters())
    started, marked, recent = time.monotonic() - seconds, time.monotonic(), []
    images_per_batch = options.emoji_per_batch * options.drawings_per_emoji
    while step < options.steps:
        images, texts, generator = batches[step]
        pixels = augment(images, generator)
        kept = None
        if step < options.full_patches_from * options.steps:
            noise = torch.rand(len(pixels), 16, generator=generator)
            kept = noise.topk(options.patches_kept, dim=1).indices
        loss, right = loss_of(
            model, pixels, texts, kept, options.image_image_weight, options.image_image_scale, bf16
        )
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = learning_rate(step, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
            decay = min(options.ema_decay, (step + 1) / (step + 10))
            state = model.state_dict()
            for name, tensor in average.items():
                tensor.lerp_(state[name], 1.0 - decay)
        step += 1
        recent.append((loss.item(), right.item()))
        if step % 50 == 0 or step == options.steps:
            now = time.monotonic()
            losses, rights = zip(*recent, strict=True)
            record = {
                "step": step,
                "samples": step * images_per_batch,
                "loss": sum(losses) / len(losses),
                "batch_top1": sum(rights) / len(rights),
                "rate": rate,
                "scale": model.logit_scale.exp().item(),
                "samples_per_s": len(recent) * images_per_batch / (now - marked),
                "minutes": (now - started) / 60,
            }
            if step % 250 == 0 or step == options.steps:
                record |= validate(average, model, val, labels)
                save_checkpoint(out, step, model, average, optimizer, time.monotonic() - started)
            write(record)
            recent, marked = [], time.monotonic()
    export(average, batches.used_tokens, options.seed, out / "model")


def main() -> None:
    """Read the options and train."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--export-only", action="store_true", help="write the checkpoint's weights")
    for name, value in asdict(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    data, out, threads = arguments.pop("data"), arguments.pop("out"), arguments.pop("threads")
    compiled, export_only = not arguments.pop("no_compile"), arguments.pop("export_only")
    options = Options(**arguments)
    if export_only:
        emoji = read_emoji(data)
        empty = Drawings(torch.empty(0, 3, 64, 64), torch.empty(0, dtype=torch.long))
        used = Batches(empty, emoji, options).used_tokens
        export(
            load_file(out / "checkpoint" / "average.safetensors"), used, options.seed, out / "model"
        )
    else:
        train(options, data, out, compiled=compiled, threads=threads)


if __name__ == "__main__":
    main()
