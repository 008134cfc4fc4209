"""What is told of a zoo model; its test module names the folder, `FOLDER`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="module")
def card(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load((request.module.FOLDER / "card.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def metrics(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads((request.module.FOLDER / "metrics.json").read_text(encoding="utf-8"))
