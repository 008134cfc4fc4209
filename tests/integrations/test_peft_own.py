"""Slow: PEFT's own tests of CorDA pass with our function in place of theirs."""

from __future__ import annotations

import pytest

from tests.integrations.peft_own import ROOT, run


@pytest.mark.slow
def test_pefts_own_tests_of_corda_pass_with_one_import_changed():
    done = run(ROOT / "runs" / "integrations" / "peft")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
