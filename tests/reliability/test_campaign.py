"""The campaign in short, and two processes at once; `make reliability` runs the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.reliability.races import RACED


def run(module: str, *words: str) -> str:
    """What a module prints, which ends well."""
    ran = subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-10_000:] + ran.stderr[-3000:]
    return ran.stdout


def test_a_short_campaign_finds_nothing(tmp_path):
    """A kill of most verbs, two damaged files of each kind, some of the bad inputs: all in words."""
    printed = run("tests.reliability.short", str(tmp_path))
    assert "could not be gone on from" in printed
    check_races(json.loads(printed.splitlines()[-1]), {"calibrate", "evaluate", "run"})


def check_races(ends: dict, raced: set[str]) -> None:
    assert set(ends) == raced
    for verb, (kinds, told, alike) in ends.items():
        assert alike, f"{verb}: what two processes wrote differs from what one does"
        assert kinds in (["ok", "ok"], ["ok", "refused"]), (verb, kinds, told)
        if "refused" in kinds:
            assert "is being written by process" in told, (verb, told)
    refused = {verb for verb, (kinds, *_) in ends.items() if "refused" in kinds}
    assert "run" in refused, "two of them at once, and neither was told of the other"
    assert "evaluate" not in refused, "they add to one file, in turn"


@pytest.mark.slow
def test_a_long_campaign_finds_nothing(tmp_path):
    run("tests.reliability.campaign", "--keep", str(tmp_path))
    printed = run("tests.reliability.races", str(tmp_path))
    check_races(json.loads(printed.splitlines()[-1]), set(RACED))
