"""The campaign in short, and two processes at once; `make reliability` runs the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_a_short_campaign_finds_nothing(tmp_path):
    """Some kills of each verb, some damaged files of each kind, some of the bad inputs: all in words."""
    command = [sys.executable, "-m", "tests.reliability.campaign", "--keep", str(tmp_path), "--seconds=20", "--cases=2", "--every=20"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]
    assert "could not be gone on from" in ran.stdout
    races = [sys.executable, "-m", "tests.reliability.races", str(tmp_path)]
    ran = subprocess.run(races, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    ends = json.loads(ran.stdout.splitlines()[-1])
    assert ends, "no verb was raced"
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
    command = [sys.executable, "-m", "tests.reliability.campaign", "--keep", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stdout[-10_000:] + ran.stderr[-3000:]
