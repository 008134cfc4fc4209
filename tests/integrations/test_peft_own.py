"""PEFT's own tests of its CorDA, with our function in place of theirs."""

from __future__ import annotations

import re

import pytest

from tests.integrations.peft_own import ROOT, run


@pytest.mark.slow
def test_class(measured):
    """its own TestCordaInitialization passes, all of it, with one import changed"""
    done = run(ROOT / "runs" / "integrations" / "peft")
    assert done.returncode == 0, done.stdout[-3000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    assert int(found[1]) >= 26
    assert "skipped" not in done.stdout
    measured(f"{found[1]} tests")
