"""What records of the digits must be, whichever source they are read from."""

from __future__ import annotations

import numpy as np


def check_digits(data, count):
    """`count` records of digits, which are not all the same."""
    assert len(data) == count
    for record in data:
        assert record["image"].size == (8, 8)
    pixels = {np.asarray(record["image"]).tobytes() for record in data}
    assert len(pixels) > count * 0.9
