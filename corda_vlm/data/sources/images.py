"""From whatever a source stores for a picture to an RGB image."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from corda_vlm.data.paths import plain_file
from corda_vlm.errors import CordaError, DataError, first_line
from corda_vlm.files import shown

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
"""File names that count as pictures when a folder or an archive is read."""

_FORMATS = (
    "JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO",
)  # fmt: skip
"""What is decoded, whatever a file is called. PIL knows more, and for one of them (EPS) starts another program."""

_MOST_BYTES = 1 << 30
"""Of a file with one picture; more would fill the memory before it is known to be none."""


class Undecodable(DataError):
    """A picture that cannot be decoded: which one, and why."""


def to_rgb(stored: Any, base: Path | None = None) -> Image.Image:
    """Decode a stored picture into an RGB image.

    Args:
        stored: encoded bytes; a path (relative ones are looked for in `base`); a data: URL in base64; a PIL image;
            an array of shape (H, W) or (H, W, 3) in uint8; or Hugging Face's `{"bytes": ..., "path": ...}`.
        base: the folder that relative paths are relative to.

    Transparent pictures are laid on white, as drawings are meant to be seen; PIL's own `convert("RGB")`
    would show whatever color hides under the transparency, usually black. Sixteen-bit grays keep their
    upper eight bits instead of saturating.

    Raises:
        Undecodable: there is no picture, it is damaged, or it has so many pixels that PIL takes it for an attack; the
            message names the picture where it has a name.
    """
    try:
        return _rgb(stored, base)
    except Exception as error:  # a decoder that meets damage may raise anything
        raise Undecodable(_why(error, stored)) from error


def fetched(get: Callable[[int], Any], row: int) -> Any:
    """What a source has stored for the picture of a row. Raises `Undecodable` if it cannot be read."""
    try:
        return get(row)
    except CordaError:
        raise
    except Exception as error:  # of whatever library the source is read by
        raise Undecodable(
            f"its image cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from error


def _why(error: Exception, stored: Any) -> str:
    """Why a picture does not decode, for people."""
    if isinstance(stored, Mapping):
        stored = stored.get("path")
    named = ""
    if isinstance(stored, (str, Path)):  # a data: URL would fill pages
        named = f": {str(stored)[:30]}..." if is_data_url(stored) else f": {shown(stored)}"
    # PIL's own words for an unknown format name an address in memory.
    reason = "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
    return f"no image that can be decoded{named} ({type(error).__name__}: {reason:.500})"


def is_data_url(stored: Any) -> bool:
    return isinstance(stored, str) and stored[:5].lower() == "data:"


def _rgb(stored: Any, base: Path | None) -> Image.Image:
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
        image = _opened(stored)
    elif isinstance(stored, (str, Path)):
        path = plain_file(Path(stored) if base is None else base / stored)
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(
                f"a file of {path.stat().st_size:,} bytes, which is more than a picture has"
            )
        # Read at once: a lazy PIL image would keep the file open until it is collected.
        image = _opened(path.read_bytes())
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


def _opened(content: bytes | bytearray | memoryview) -> Image.Image:
    Image.init()  # else PIL knows the most common formats alone
    formats = [name for name in _FORMATS if name in Image.OPEN]  # AVIF is not in every build
    return Image.open(io.BytesIO(content), formats=formats)


def _of_data_url(url: str) -> bytes:
    header, _, body = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise ValueError("a data: URL is read only where it is in base64; give the path of a file")
    return base64.b64decode(body)


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """A gray image of 16 or 32 bits a pixel, brought to 8.

    Mode "I" may hold either depth, so there a value above 255 is what says sixteen bits.
    """
    grey = np.asarray(image, dtype=np.float64)
    if image.mode.startswith("I;16") or grey.max(initial=0) > 255:
        grey = grey / 257
    return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
