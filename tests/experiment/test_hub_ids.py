"""`corda-vlm new` with ids of a hub, whose files lie in its cache: nothing is asked of the network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from corda_vlm.experiment.load import load_experiment
from corda_vlm.files import asset

SHA = "a" * 40

CODE = """
import sys
from corda_vlm.__main__ import main
main(["new", "owner/birds", "--model", "owner/shapes", "--knowledge", "owner/fish", "--quick", "--output", "first"])
main(["sites", "owner/shapes"])
from corda_vlm.data import load_records
for name in ("birds", "fish"):
    print(name, len(load_records({"source": f"hf:owner/{name}", "split": "train", "format": "qa"})))
main(["new", "owner/none", "--output", "second"])
"""


def cached(home: Path, kind: str, name: str) -> Path:
    """The folder of a snapshot as huggingface_hub lays out its cache."""
    repo = home / "hub" / f"{kind}s--owner--{name}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(SHA)
    snapshot = repo / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.fixture
def home(tmp_path) -> Path:
    """A cache with a model and two data sets."""
    home = tmp_path / "home"
    source = asset("model_zoo/shapes-llava")
    snapshot = cached(home, "model", "shapes")
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".safetensors"):
            shutil.copyfile(path, snapshot / path.name)
    for name, count in (("birds", 30), ("fish", 40)):
        snapshot = cached(home, "dataset", name)
        rows = [
            {"question": f"Which {name} is number {n}?", "answer": f"{n}"} for n in range(count)
        ]
        (snapshot / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    return home


@pytest.mark.slow
def test_a_first_experiment_of_ids_whose_files_are_cached(home, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr  # of the last, which is nowhere
    assert "hf:owner/none" in done.stderr
    assert "give a hub name that can be reached, or a local folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "second").exists()
    assert "the hub was not reached; read from its cache" in done.stderr
    assert "birds 30" in done.stdout
    assert "fish 40" in done.stdout
    assert "owner/birds: " in done.stdout
    run = load_experiment(str(tmp_path / "first" / "experiment.yaml"))
    assert run.model == "owner/shapes"
    text = (tmp_path / "first" / "experiment.yaml").read_text() + (
        tmp_path / "first" / "suite.yaml"
    ).read_text()
    assert "hf:owner/birds" in text
    assert "hf:owner/fish" in text
    assert str(home) not in text, "an id holds on other machines too"
