"""The pages of docs/ build without a warning, and what they say to type works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from corda_vlm.__main__ import main
from corda_vlm.experiment.load import load_experiment
from corda_vlm.files import asset

DOCS = asset("docs")
PAGES = sorted((DOCS / "pages").rglob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = "".join(blocks(page, "sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def test_they_build_and_a_warning_is_an_error(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra corda-vlm[docs] is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--config-file",
         str(DOCS / "mkdocs.yml"), "--site-dir", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CovarianceStore" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")


@pytest.mark.unchecked
@pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")
@pytest.mark.usefixtures("own_registrations", "one_text_side")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), scope)


@pytest.mark.unchecked
@pytest.mark.filterwarnings("ignore:.*fewer tokens than their width")
@pytest.mark.usefixtures("one_text_side")
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_the_commands_of_a_page_work_one_after_another(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        assert words[0] in ("corda-vlm", "pip"), words
        if words[:2] == ["corda-vlm", "run"]:
            assert load_experiment(words[2]).variants
        elif words[0] == "corda-vlm":
            main(words[1:])


def test_what_a_page_shows_of_the_layers_is_what_the_command_prints(capsys):
    main(["sites", "emoji-clip"])
    (shown,) = blocks(DOCS / "pages" / "how-to" / "clip.md", "text")
    assert shown.strip() == capsys.readouterr().out.strip()
