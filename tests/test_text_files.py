"""The hook of .pre-commit-config.yaml that mends the ends of lines and of files."""

from __future__ import annotations

import pytest
import yaml

from corda_vlm.files import asset
from tests.text_files import main


def test_what_it_mends_it_tells_and_then_is_content(tmp_path, capsys):
    path, empty = tmp_path / "a.md", tmp_path / "empty.py"
    path.write_bytes(b"one  \n\ttwo\t\r\nthree\n\n\n")
    empty.touch()
    assert main([str(path), str(empty)]) == 1
    assert path.read_bytes() == b"one\n\ttwo\t\r\nthree\n"
    assert capsys.readouterr().out == f"mended {path}\n"
    assert main([str(path), str(empty)]) == 0


def test_hooks_are_local_so_that_nothing_is_downloaded():
    repos = yaml.safe_load(asset(".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    assert {hook["language"] for hook in repos[0]["hooks"]} == {"system"}


@pytest.mark.parametrize("tool", ["ruff check", "ruff format", "pyright"])
def test_the_hooks_run_what_make_runs(tool):
    hooks = asset(".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert f".venv/bin/{tool}" in hooks
    assert f"$(BIN)/{tool}" in asset("Makefile").read_text(encoding="utf-8")
