"""Make caltech25.parquet: 25 classes of Caltech-101, 20 photos each, 64 pixels on the short side.

    python eval/data/caltech25/make.py TRAIN.parquet TEST.parquet

The two files hold ten photos a class, disjoint, with the columns image (bytes), class_name and path. Every fourth class of
the alphabet is taken, so that nobody chose them. Of the first file's photos seven train and three validate.
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES, TRAIN, SIDE = 25, 7, 64


def main(train: Path, test: Path, output: Path) -> None:
    files = {"train": read(train), "test": read(test)}
    names = sorted(files["train"], key=str.casefold)[::4][:CLASSES]
    rows = []
    for label, name in enumerate(names):
        for part, of in files.items():
            for number, record in enumerate(of[name]):
                split = "val" if part == "train" and number >= TRAIN else part
                rows.append(
                    {
                        "image": small(record["image"]),
                        "label": label,
                        "class_name": name,
                        "path": record["path"],
                        "split": split,
                    }
                )
    pq.write_table(pa.Table.from_pylist(rows), output, compression="none")
    print(f"{output}: {len(rows)} photos of {len(names)} classes, {output.stat().st_size:,} bytes")


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Class name -> its records, in the file's order."""
    found = defaultdict(list)
    for record in pq.read_table(path).to_pylist():
        found[record["class_name"]].append(record)
    return found


def small(encoded: bytes | dict[str, bytes]) -> bytes:
    picture = Image.open(io.BytesIO(encoded if isinstance(encoded, bytes) else encoded["bytes"]))
    scale = SIDE / min(picture.size)
    size = (max(SIDE, round(picture.width * scale)), max(SIDE, round(picture.height * scale)))
    buffer = io.BytesIO()
    resized = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    resized.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("caltech25.parquet")
    )
    arguments = parser.parse_args()
    main(arguments.train, arguments.test, arguments.output)
