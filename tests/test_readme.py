"""Every command and every line of Python in the README works as written."""

from __future__ import annotations

import itertools
import re
import shlex

import pytest

from corda_vlm.__main__ import main
from corda_vlm.experiment.load import load_experiment
from corda_vlm.files import asset

README = asset("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The words of each command of a block; a line that ends with a backslash goes on in the next."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


COMMANDS = [words for language, block in BLOCKS if language == "sh" for words in commands(block)]
WRITTEN_BY_DEFAULT = {
    "calibrate": "covariance.safetensors",
    "gradient": "gradient.safetensors",
    "plan": "plan.json",
}


@pytest.mark.unchecked
@pytest.mark.usefixtures("own_registrations", "one_text_side")
def test_the_python_of_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "trainable params" in printed
    assert "openmoji" in printed
    assert (tmp_path / "digits-clip" / "open_clip_model.safetensors").is_file()


@pytest.mark.unchecked
@pytest.mark.usefixtures("one_text_side")
def test_the_verbs_of_the_readme_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chain = [words[1:] for words in COMMANDS if words[0] == "corda-vlm" and words[1] != "run"]
    assert {"sites", "calibrate", "gradient", "plan", "train", "evaluate", "export"} == {
        w[0] for w in chain
    }
    for words in chain:
        main(words)
    assert "digits: top1" in capsys.readouterr().out
    assert (tmp_path / "digits-clip" / "open_clip_model.safetensors").is_file()
    assert (tmp_path / "plan.png").is_file()


@pytest.mark.parametrize(
    "block", [b for language, b in BLOCKS if language == "sh" and "corda-vlm calibrate" in b]
)
def test_what_a_command_reads_was_written_by_one_before_it_in_its_block(block):
    """An older file of that name, e.g. of the block before, would be taken without a word."""
    written: set[str] = set()
    for words in commands(block):
        given = dict(itertools.pairwise(words))
        read = {
            given[option]
            for option in ("--plan", "--covariance", "--gradient", "--adapter")
            if option in given
        }
        if words[1] == "export":
            read.add(words[3].removesuffix("/weights"))
        assert read <= written, f"{words}: nothing in this block writes {sorted(read - written)}"
        if "--dry-run" not in words:
            written |= {given[option] for option in ("--output", "--picture") if option in given}
            if words[1] in WRITTEN_BY_DEFAULT:
                written.add(given.get("--output", WRITTEN_BY_DEFAULT[words[1]]))


@pytest.mark.parametrize("words", [w for w in COMMANDS if "run" in w], ids=" ".join)
def test_the_experiments_of_the_readme_exist(words):
    assert load_experiment(words[-1]).variants


def test_the_other_commands_are_targets_and_installs():
    makefile = asset("Makefile").read_text(encoding="utf-8")
    for words in COMMANDS:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), words
        else:
            assert words[0] in ("corda-vlm", "pip", "pytest"), words


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_links_lead_somewhere(target):
    assert asset(target).exists()


def test_no_number_is_still_missing():
    assert "<!--" not in README, "a placeholder for a measurement is left"
