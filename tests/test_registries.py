"""The registries: plain dicts, a name for one thing, and what is registered is public."""

from __future__ import annotations

import subprocess
import sys

import pytest

import corda_vlm
from corda_vlm.errors import CordaError
from corda_vlm.registries import register


def test_a_name_stands_for_one_thing():
    registry: dict[str, object] = {}
    thing = object()
    assert register(registry, "colour", "red", thing) is thing
    assert register(registry, "colour", "red", thing) is thing  # again, as a notebook does
    with pytest.raises(CordaError, match="a colour named 'red' is registered already"):
        register(registry, "colour", "red", object())
    assert registry == {"red": thing}


@pytest.mark.parametrize("name", ["", " red", "re\nd", 3, None])
def test_a_name_is_text_that_people_can_type(name):
    with pytest.raises(CordaError, match="a colour cannot be called"):
        register({}, "colour", name, object())


def test_each_registry_has_a_public_way_in():
    for name in ("family", "method", "metric", "rank_rule", "source", "task"):
        assert callable(getattr(corda_vlm, f"register_{name}"))


def test_to_register_a_method_a_source_a_task_or_a_metric_takes_no_pytorch():
    code = (
        "import sys\n"
        "from corda_vlm import register_method, register_metric, register_source, register_task\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
