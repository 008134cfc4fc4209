"""What the ranks of `tests.distributed.toy` did, once for all tests of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from corda_vlm.covariance import CovarianceStore


@dataclass(frozen=True)
class Ranks:
    """What happened.

    Attributes:
        told: what each piece of work returned on each rank.
        folder: what they wrote.
    """

    told: dict[str, Any]
    folder: Path

    def same(self, work: str, key: str) -> Any:
        """What all ranks of a piece of work told alike."""
        every = [told[key] for told in self.told[work]]
        assert all(told == every[0] for told in every), every
        return every[0]

    def store(self, name: str) -> CovarianceStore:
        return CovarianceStore.load(self.folder / f"{name}.safetensors")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Ranks:
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent  # of all workers, which take what the first of them made
    folder = base / "ranks"
    with FileLock(base / "ranks.lock"):
        if not (folder / "told.json").exists():
            folder.mkdir(exist_ok=True)
            done = subprocess.run(
                [sys.executable, "-m", "tests.distributed.toy", str(folder)],
                capture_output=True,
                text=True,
                timeout=400,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr[-4000:]
    return Ranks(json.loads((folder / "told.json").read_text()), folder)
