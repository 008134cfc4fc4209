"""Make shapes24.parquet: pictures of easy-VQA, each with its shape and color as its class.

    python eval/data/shapes24/make.py TRAIN.parquet TEST.parquet

The two files hold easy-VQA's training and test pictures with the columns image (bytes) and qa_json (their questions and
answers). Shape and color are read from the questions; a picture whose questions leave one of them open is left out.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
TRAIN, VALIDATE, TEST = 1000, 300, 500


def main(train: Path, test: Path, output: Path) -> None:
    shuffled = list(pictures(train))
    random.Random(0).shuffle(shuffled)
    parts = {
        "train": shuffled[:TRAIN],
        "val": shuffled[TRAIN : TRAIN + VALIDATE],
        "test": list(pictures(test))[:TEST],
    }
    rows = [
        {"image": image, "class_name": name, "split": split}
        for split, chosen in parts.items()
        for image, name in chosen
    ]
    pq.write_table(pa.Table.from_pylist(rows), output, compression="none")
    print(f"{output}: {len(rows)} pictures, {output.stat().st_size:,} bytes")


def pictures(path: Path) -> Iterator[tuple[bytes, str]]:
    """Each picture whose questions tell its shape and its color, with the two as its class."""
    for record in pq.read_table(path).to_pylist():
        image = record["image"] if isinstance(record["image"], bytes) else record["image"]["bytes"]
        words = {word for q in json.loads(record["qa_json"]) for word in told(q)}
        shape = [name for name in SHAPES if name in words]
        color = [name for name in COLORS if name in words]
        if len(shape) == len(color) == 1:
            yield image, f"{color[0]} {shape[0]}"


def told(question: dict[str, str]) -> set[str]:
    """The words that a question and its answer say of the picture."""
    answer, words = question["answer"], set(question["question"].rstrip("?").split())
    if answer not in ("yes", "no"):
        return {answer}
    negated = bool(words & {"not", "no"})
    return words if (answer == "yes") != negated else set()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("shapes24.parquet"))
    arguments = parser.parse_args()
    main(arguments.train, arguments.test, arguments.output)
