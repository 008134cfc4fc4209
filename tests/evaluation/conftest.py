"""A processor for the tiny models, and a few pictures that anyone can tell apart."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from corda_vlm.data import load_records
from corda_vlm.families import detect_family
from corda_vlm.families.base import Loaded, Processor

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def picture(colour: str, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, size=(40, 40, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def tiny_processor() -> Processor:
    """32-pixel images; words become ids below 100, with the highest id as end of text (CLIP pools there)."""

    def image(picture: Any) -> torch.Tensor:
        pixels = np.asarray(picture.convert("RGB").resize((32, 32)), dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def text(texts: Any) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(texts), 12, dtype=torch.long)
        for row, words in enumerate(texts):
            for column, word in enumerate(words.split()[:10]):
                ids[row, column] = 1 + sum(map(ord, word)) % 96
            ids[row, min(10, len(words.split()))] = 99
        return {"input_ids": ids, "attention_mask": torch.arange(12) <= ids.argmax(1, keepdim=True)}

    return Processor(image=image, text=text, image_size=(32, 32))


@pytest.fixture
def colour_folder(tmp_path: Path) -> Path:
    """One folder a class, four pictures each."""
    for colour in COLOURS:
        for seed in range(4):
            file = tmp_path / "colours" / colour / f"{seed}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(colour, seed).save(file)
    return tmp_path / "colours"


@pytest.fixture
def colour_parquet(tmp_path: Path) -> Path:
    """The same with captions, some pictures with several."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for index, colour in enumerate(COLOURS):
        for seed in range(4):
            buffer = io.BytesIO()
            picture(colour, seed).save(buffer, "PNG")
            captions = [f"a {colour} picture number {seed}", f"picture {seed} in {colour}"][
                : 1 + index % 2
            ]
            rows.append({"image": buffer.getvalue(), "captions": captions, "colour": colour})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "colours.parquet")
    return tmp_path / "colours.parquet"


@pytest.fixture
def records(tmp_path):
    def make(rows: list[dict[str, Any]], **options: Any) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return load_records({"source": f"jsonl:{path}", "format": "qa", **options})

    return make


@pytest.fixture
def document(tmp_path):
    def make(*texts: str) -> Any:
        path = tmp_path / "texts.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        return load_records({"source": f"jsonl:{path}", "format": "text"})

    return make


@pytest.fixture
def loaded(tiny_clip_hf, tiny_processor) -> Loaded:
    return Loaded(tiny_clip_hf, tiny_processor, detect_family(tiny_clip_hf), "tiny")


def suite_of(folder: Path, **changes: Any) -> dict[str, Any]:
    task = {
        "name": "colours", "role": "retention", "kind": "zero_shot", "data": f"folder:{folder}",
        "classes": ["red", "green", "blue"], "templates": ["a {} picture"], "metrics": ["top1", "mean_per_class"],
    }  # fmt: skip
    return {"name": "test", "version": 1, "tasks": [{**task, **changes}]}
