"""From whatever a source stores for a picture to an RGB image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
"""File names that count as pictures when a folder or an archive is read."""

UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, TypeError, Image.DecompressionBombError)
"""What PIL and our own conversion raise on a picture that cannot be decoded."""


class Undecodable(ValueError):
    """A picture that cannot be decoded: which one, and why."""


def decoded(stored: Any, base: Path | None = None) -> Image.Image:
    """As `to_rgb`. Raises `Undecodable`, which names the picture where it has a name."""
    try:
        return to_rgb(stored, base)
    except UNDECODABLE as error:
        raise Undecodable(undecodable(error, stored)) from error


def undecodable(error: BaseException, stored: Any = None) -> str:
    """Why a picture does not decode, for people."""
    if isinstance(error, Undecodable):
        return str(error)
    if isinstance(stored, Mapping):
        stored = stored.get("path")
    named = ""
    if isinstance(stored, (str, Path)):  # a data: URL would fill pages
        named = f": {stored}" if len(str(stored)) <= 300 else f": {str(stored)[:30]}..."
    # PIL's own words for an unknown format name an address in memory.
    reason = "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
    return f"no image that can be decoded{named} ({type(error).__name__}: {reason})"


def is_data_url(stored: Any) -> bool:
    return isinstance(stored, str) and stored[:5].lower() == "data:"


def to_rgb(stored: Any, base: Path | None = None) -> Image.Image:
    """Decode a stored picture into an RGB image.

    Args:
        stored: encoded bytes; a path (relative ones are looked for in `base`); a data: URL in base64; a PIL image;
            an array of shape (H, W) or (H, W, 3) in uint8; or Hugging Face's `{"bytes": ..., "path": ...}`.
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
    if is_data_url(stored):
        stored = _of_data_url(stored)
    if isinstance(stored, str) and stored[:8].lower().startswith(("http://", "https://")):
        raise ValueError("an address is not fetched; download it and give its path")
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


def _of_data_url(url: str) -> bytes:
    header, _, body = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise ValueError("a data: URL is read only where it is in base64; give the path of a file")
    return base64.b64decode(body)


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits a pixel, brought to 8.

    Mode "I" may hold either depth, so there a value above 255 is what says sixteen bits.
    """
    grey = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("I;16") or grey.max(initial=0) > 255:
        grey = grey / 257
    return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
