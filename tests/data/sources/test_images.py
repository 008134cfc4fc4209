"""Decoding: every mode of picture that real data sets hold becomes RGB, and damage is an error."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from corda_vlm.data.sources.images import Undecodable, to_rgb


def _encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pixel(stored, **options) -> Any:
    image = to_rgb(stored, **options)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_plain_modes():
    assert _pixel(_encoded(Image.new("RGB", (4, 4), (10, 20, 30)))) == (10, 20, 30)
    assert _pixel(_encoded(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert _pixel(_encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)


def test_transparency_is_laid_on_white():
    # What hides under full transparency here is red; `convert("RGB")` would show it.
    assert _pixel(_encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == (255, 255, 255)
    assert _pixel(_encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))) == (255, 0, 0)
    assert _pixel(_encoded(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)
    half = _pixel(_encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128))))
    assert half == pytest.approx((127, 127, 127), abs=1)


def test_palette_with_and_without_transparency():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 0, 200, 0])
    assert _pixel(_encoded(image)) == (0, 200, 0)
    assert _pixel(_encoded(image, transparency=1)) == (255, 255, 255)


def test_cmyk_jpeg():
    red, green, blue = _pixel(_encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red > 200
    assert green < 60
    assert blue < 60


@pytest.mark.parametrize("value", [0, 128, 40_000, 65_535])
def test_sixteen_bit_grey_keeps_its_upper_byte(value):
    image = Image.fromarray(np.full((4, 4), value, dtype=np.uint16))
    assert _pixel(_encoded(image))[0] == pytest.approx(value / 257, abs=0.5)


def test_forms_of_storage(tmp_path):
    blue = Image.new("RGB", (4, 4), (0, 0, 255))
    (tmp_path / "blue.png").write_bytes(_encoded(blue))
    for stored in (
        blue,
        np.asarray(blue),
        tmp_path / "blue.png",
        {"bytes": _encoded(blue), "path": "gone.png"},
        {"bytes": None, "path": str(tmp_path / "blue.png")},
        memoryview(_encoded(blue)),
    ):
        assert _pixel(stored) == (0, 0, 255)
    assert _pixel("blue.png", base=tmp_path) == (0, 0, 255)


@pytest.mark.parametrize(
    "stored",
    [
        None,
        b"",
        b"no image at all",
        b"\x89PNG\r\n\x1a\n",
        "nowhere.png",
        7,
        {"bytes": None, "path": None},
    ],
)
def test_what_is_no_image_raises(stored):
    with pytest.raises(Undecodable):
        to_rgb(stored)


def test_a_picture_cut_short_raises():
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = _encoded(noise, kind)
        with pytest.raises(Undecodable):
            to_rgb(whole[: len(whole) // 2])
