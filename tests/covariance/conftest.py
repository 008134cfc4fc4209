"""Makes `covariance_toy` and the families' `language_toy` importable, and the toy's family known."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "families")]


@pytest.fixture(autouse=True)
def _toy_family() -> Iterator[None]:
    from covariance_toy import TOY

    from corda_vlm.families import FAMILIES, register_family

    register_family(TOY)
    yield
    FAMILIES.pop("toy")
