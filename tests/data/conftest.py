"""Small data sets on disk, made from the real digits that scikit-learn bundles."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from corda_vlm.families.base import Processor

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="session")
def digits() -> list[tuple[bytes, int]]:
    """60 digits: (encoded picture, label)."""
    found: Any = load_digits()
    pictures = (found.images[:60] * 15).astype(np.uint8)
    encoded = []
    for picture, label in zip(pictures, found.target[:60], strict=True):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        encoded.append((buffer.getvalue(), int(label)))
    return encoded


@pytest.fixture
def parquet(tmp_path: Path, digits) -> Path:
    """Two parquet files with several row groups; returns their folder."""
    for part in range(2):
        rows = digits[part * 30 : part * 30 + 30]
        table = pa.table(
            {
                "image": [picture for picture, _ in rows],
                "word": [WORDS[label] for _, label in rows],
                "split": ["heldout" if i % 5 == 0 else "train" for i in range(30)],
                "tags": [["digit", WORDS[label]] for _, label in rows],
                "number": [label for _, label in rows],
            }
        )
        pq.write_table(table, tmp_path / f"part{part}.parquet", row_group_size=7)
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path, digits) -> Path:
    """One folder a class in each of train/ and test/."""
    for index, (picture, label) in enumerate(digits):
        place = tmp_path / ("test" if index >= 40 else "train") / WORDS[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:03}.png").write_bytes(picture)
    return tmp_path


@pytest.fixture
def shards(tmp_path: Path, digits) -> Path:
    """Two webdataset shards with png, cls, txt and json members."""
    for part in range(2):
        with tarfile.open(tmp_path / f"digits-{part:03}.tar", "w") as archive:
            for index in range(part * 10, part * 10 + 10):
                picture, label = digits[index]
                members = {
                    "png": picture,
                    "cls": str(label).encode(),
                    "txt": f"the digit {WORDS[label]}\n".encode(),
                    "json": json.dumps({"source": f"s{index}"}).encode(),
                }
                for ending, content in members.items():
                    info = tarfile.TarInfo(f"./{index:05}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return tmp_path


@pytest.fixture
def captions(tmp_path: Path, digits) -> Path:
    """A jsonl of picture paths and captions, pictures beside it."""
    lines = []
    for index, (picture, label) in enumerate(digits[:20]):
        (tmp_path / f"{index}.png").write_bytes(picture)
        lines.append(json.dumps({"image": f"{index}.png", "caption": f"a {WORDS[label]}"}))
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def processor() -> Processor:
    """16-pixel grey-level images; letters as tokens, padded to the longest text."""

    def image(picture: Image.Image) -> torch.Tensor:
        pixels = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32)
        return torch.from_numpy(pixels / 255).permute(2, 0, 1)

    def text(texts) -> dict[str, torch.Tensor]:
        length = max(map(len, texts))
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        for row, one in enumerate(texts):
            ids[row, : len(one)] = torch.tensor([ord(letter) % 100 for letter in one])
        return {"input_ids": ids, "attention_mask": ids > 0}

    return Processor(image=image, text=text, image_size=(16, 16))
