"""PEFT's own tests of its CorDA, with one import changed.

    python -m tests.integrations.peft_own

They are taken from the source distribution of the PEFT that is installed, by pip, into runs/integrations, and are not a part
of this repository. One test asks a hub for a tiny random GPT-2; it is given one that is made here.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
THEIRS = "from peft.tuners.lora.corda import preprocess_corda"
OURS = "from corda_vlm.integrations.peft import preprocess_corda"
GPT2 = """
import pytest, transformers

@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    def tiny(name, *_, **__):
        assert name.endswith("tiny-random-gpt2"), name
        sizes = dict(vocab_size=1000, n_embd=32, n_layer=5, n_head=4, n_inner=37, n_positions=64)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", tiny)
"""


def fetched(folder: Path) -> Path:
    """The folder of PEFT's tests, of the installed version."""
    version = importlib.metadata.version("peft")
    tests = folder / f"peft-{version}" / "tests"
    if not tests.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        get = ["download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        command = [sys.executable, "-m", "pip", *get, "-d", str(folder), f"peft=={version}"]
        subprocess.run(command, check=True)
        with tarfile.open(folder / f"peft-{version}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return tests


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the tests of the class `TestCordaInitialization`, with our function in place of theirs."""
    tests = fetched(folder)
    changed = folder / "changed"
    changed.mkdir(exist_ok=True)
    text = (tests / "test_initialization.py").read_text(encoding="utf-8")
    assert text.count(THEIRS) == 1
    text = text.replace(THEIRS, OURS).replace("from .testing_utils", "from testing_utils")
    (changed / "test_initialization.py").write_text(text, encoding="utf-8")
    (changed / "testing_utils.py").write_bytes((tests / "testing_utils.py").read_bytes())
    (changed / "conftest.py").write_text(GPT2, encoding="utf-8")
    # its own settings: without a file of them those of this repository would hold
    (changed / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", ".", "-k", "TestCordaInitialization"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_initialization.py"],
        cwd=changed,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )


if __name__ == "__main__":
    done = run(ROOT / "runs" / "integrations" / "peft")
    print(done.stdout[-3000:], done.stderr[-1000:])
    sys.exit(done.returncode)
