"""easy-VQA as one parquet file with a validation split, and the picture samples.png.

::

    pip install easy-vqa==1.0
    python model_zoo/shapes-llava/make_data.py

A row is an image: `image` (the package's PNG bytes), `image_id`, `qa_json` (a JSON list of {"question",
"answer"}) and `split`. A tenth of the training images is `val`, by a seeded hash of the image's bytes, so
that the split follows from the image alone; `test` is the official test set.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import random
import shutil
from importlib.metadata import distribution
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from shapes import SIZE, draw_scene, paint

HERE = Path(__file__).resolve().parent
VAL_SHARE = 0.1


def split_of(image: bytes) -> str:
    """ "val" for a tenth of the training images, else "train"."""
    digest = hashlib.sha256(b"shapes-llava" + image).digest()
    return "val" if int.from_bytes(digest[:4], "big") / 2**32 < VAL_SHARE else "train"


def rows_of(package: Path, part: str) -> list[dict[str, object]]:
    """The rows of the package's "train" or "test" part, by image."""
    folder = package / "data" / part
    pairs: dict[int, list[dict[str, str]]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text()):
        pairs.setdefault(image, []).append({"question": question, "answer": answer})
    rows = []
    for number in sorted(pairs):
        image = (folder / "images" / f"{number}.png").read_bytes()
        split = "test" if part == "test" else split_of(image)
        asked = json.dumps(pairs[number])
        rows.append({"image": image, "image_id": number, "qa_json": asked, "split": split})
    return rows


def write_data(package: Path, out: Path) -> None:
    """Write `out`, and the licence beside it."""
    table = pa.Table.from_pylist([*rows_of(package, "train"), *rows_of(package, "test")])
    found = distribution("easy-vqa")
    source = f"easy-vqa {found.version} (PyPI)"
    table = table.replace_schema_metadata({"source": source, "licence": "MIT"})
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, out, compression="zstd", compression_level=19)
    licence = next(path for path in found.files or () if path.name == "LICENSE")
    shutil.copyfile(str(licence.locate()), out.with_name("LICENSE-easy-vqa.txt"))


def write_samples(data: Path, out: Path, columns: int = 12, rows: int = 4) -> None:
    """Training images of easy-VQA on the left, drawn ones on the right."""
    table = pq.read_table(data, columns=["image", "split"]).to_pylist()
    pngs = [row["image"] for row in table if row["split"] == "train"][: columns * rows]
    official = [Image.open(io.BytesIO(png)).convert("RGB") for png in pngs]
    draw = random.Random(0)
    drawn = [Image.fromarray(paint(draw_scene(draw))) for _ in range(columns * rows)]
    cell, gap, top = SIZE + 2, 24, 20
    width = columns * cell
    sheet = Image.new("RGB", (2 * width + gap, top + rows * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for left, title, images in ((0, "easy-VQA", official), (width + gap, "shapes.py", drawn)):
        pen.text((left + 4, 4), title, fill="black")
        for number, image in enumerate(images):
            x, y = number % columns * cell, number // columns * cell
            sheet.paste(image, (left + x + 1, top + y + 1))
    sheet.save(out, optimize=True)


def main() -> None:
    """Read the options and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "data" / "easy_vqa.parquet")
    arguments = parser.parse_args()
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise SystemExit("the package easy-vqa is not installed: pip install easy-vqa==1.0")
    write_data(Path(spec.origin).parent, arguments.out)
    write_samples(arguments.out, HERE / "samples.png")


if __name__ == "__main__":
    main()
