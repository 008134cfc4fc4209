"""From whatever a source stores for a picture to an RGB image."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
"""File names that count as pictures when a folder or an archive is read."""

UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, TypeError, Image.DecompressionBombError)
"""What PIL and our own conversion raise on a picture that cannot be decoded."""


def to_rgb(stored: Any, base: Path | None = None) -> Image.Image:
    """Decode a stored picture into an RGB image.

    Args:
        stored: encoded bytes; a path (relative ones are looked for in `base`); a PIL image; an array of
            shape (H, W) or (H, W, 3) in uint8; or Hugging Face's `{"bytes": ..., "path": ...}`.
        base: the folder that relative paths are relative to.

    Transparent pictures are laid on white, as drawings are meant to be seen; PIL's own `convert("RGB")`
    would show whatever colour hides under the transparency, usually black. Sixteen-bit greys keep their
    upper eight bits instead of saturating.

    Raises:
        one of `UNDECODABLE`: there is no picture, or it is damaged.
    """
    if isinstance(stored, Mapping):
        stored = stored["bytes"] if stored.get("bytes") is not None else stored.get("path")
    if stored is None:
        raise ValueError("no image")
    if isinstance(stored, Image.Image):
        image = stored
    elif isinstance(stored, (bytes, bytearray, memoryview)):
        image = Image.open(io.BytesIO(stored))
    elif isinstance(stored, (str, Path)):
        path = Path(stored)
        # Read at once: a lazy PIL image would keep the file open until it is collected.
        image = Image.open(io.BytesIO((path if base is None else base / path).read_bytes()))
    elif isinstance(stored, np.ndarray):
        image = Image.fromarray(stored)
    else:
        raise TypeError(f"a picture stored as {type(stored).__name__} is not understood")
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits a pixel, brought to 8.

    Mode "I" may hold either depth, so there a value above 255 is what says sixteen bits.
    """
    grey = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("I;16") or grey.max(initial=0) > 255:
        grey = grey / 257
    return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
