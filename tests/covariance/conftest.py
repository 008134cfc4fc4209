"""Makes `covariance_toy` importable, and its family known."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _toy_family() -> Iterator[None]:
    from covariance_toy import TOY

    from corda_vlm.families import FAMILIES, register_family

    register_family(TOY)
    yield
    FAMILIES.pop("toy")
