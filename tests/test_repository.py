"""What every project has beside its code, and the commands that its Makefile and its CI promise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import corda_vlm
from corda_vlm.files import asset

ROOT = asset(".")


def test_the_licence_is_apache_2_and_whole():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_version_is_written_once():
    written = re.compile(rf"""version\w*\W+["']?{re.escape(corda_vlm.__version__)}["'\n]""")
    places = [
        path.relative_to(ROOT).as_posix()
        for path in (*ROOT.glob("*.*"), *ROOT.glob("corda_vlm/**/*.py"))
        if path.is_file() and written.search(path.read_text(encoding="utf-8"))
    ]
    assert places == ["corda_vlm/__init__.py"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", version("corda-vlm"))


def test_the_citation_reads_as_cff_has_it():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "message", "authors"} <= citation.keys()
    assert citation["license"] == "Apache-2.0"
    assert all({"title", "authors", "type"} <= set(paper) for paper in citation["references"])


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md"])
def test_what_the_pages_name_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.startswith("# ")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", text)) <= targets
    for path in re.findall(r"`([\w./]+/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def commands(target: str, cwd: Path = ROOT) -> str:
    """What make would do for a target, were nothing there yet."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=cwd, capture_output=True, text=True, check=True
    )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_make_bench_runs_the_slow_tests_and_every_benchmark():
    told = commands("bench")
    scripts = [path for path in ROOT.glob("eval/benchmarks/*.py") if "def main" in path.read_text()]
    assert len(scripts) >= 4
    for script in scripts:
        assert f"eval/benchmarks/{script.name}" in told
    # pytest ends with status 5, which stops make, where nothing is marked
    assert "pytest -m slow" in told
    marked = [path for path in ROOT.glob("tests/**/*.py") if "mark.slow" in path.read_text()]
    assert [path for path in marked if path.name != Path(__file__).name]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
@pytest.mark.parametrize("data", ["beside", "absent", "named", "named wrongly"])
def test_ci_runs_from_any_clone_and_says_what_data_it_has(data, tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    (clone / "Makefile").write_text("test:\n\t@echo data=$(CORDA_VLM_DATA)\n")
    # a make that runs these tests would have its own say in the one that they start
    left_out = ("CORDA_VLM_DATA", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    folder = tmp_path / ("shared/data" if data == "beside" else "data")
    if data in ("beside", "named"):
        folder.mkdir(parents=True)
    if data.startswith("named"):
        env["CORDA_VLM_DATA"] = str(folder)
    done = subprocess.run(
        ["bash", ".ci/run"], cwd=clone, env=env, capture_output=True, text=True, check=False
    )
    if data == "named wrongly":
        assert done.returncode == 1
        assert "is not a folder" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    found = folder if data in ("beside", "named") else ""
    assert done.stdout == f"data={found}\n"
    assert ("the tests that want it are skipped" in done.stderr) == (data == "absent")
