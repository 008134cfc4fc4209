"""Makes `covariance_toy` and the families' `language_toy` importable, and the toy's family known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _toy_family() -> Iterator[None]:
    from corda_vlm.families import FAMILIES, register_family
    from tests.covariance.covariance_toy import TOY

    register_family(TOY)
    yield
    FAMILIES.pop("toy")
