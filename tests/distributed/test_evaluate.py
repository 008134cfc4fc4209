"""Examples are dealt out to processes, and the scores are those of one."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from corda_vlm.__main__ import VERBS
from corda_vlm.command_line import Command
from corda_vlm.distributed.launch import TOGETHER
from corda_vlm.files import asset


def test_scores_are_those_of_one_process(ranks):
    alone = ranks.told["evaluates 1"][0]
    for size in (2, 4):
        for told in ranks.told[f"evaluates {size}"]:
            for what in ("texts", "pictures"):
                for one, other in zip(alone[what], told[what], strict=True):
                    assert one[:2] + one[5:] == other[:2] + other[5:]
                    assert one[2:5] == pytest.approx(other[2:5], abs=1e-6), one
    assert len(alone["texts"]) >= 4
    assert alone["pictures"][0][5] == 50


def test_what_the_model_said_is_written_once(ranks):
    alone = _rows(ranks, 1)
    assert len(alone) > 50
    for size in (2, 4):
        assert _rows(ranks, size) == alone


def _rows(ranks, size) -> list[dict]:
    text = (ranks.folder / f"predictions.{size}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_model_that_diverged_has_no_score_on_any(ranks):
    for told in ranks.told["evaluates 2"]:
        assert "task sure of suite texts" in told["diverged"]
        assert "NaN or Inf" in told["diverged"]


def test_the_verbs_print_and_write_once(ranks):
    for verb in ("calibrate", "plan", "evaluate"):
        (status, printed), (other, nothing) = ranks.told[f"{verb} 2"]
        assert status == other == 0, printed + nothing
        assert nothing == "", "the first alone prints"
        assert ("added" if verb == "evaluate" else "wrote") in printed
    folders = [ranks.folder / f"commands{size}" for size in (1, 2)]
    rows = [
        [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        for folder in folders
    ]
    told = [[(row["task"], row["metric"], row["value"]) for row in of] for of in rows]
    assert told[0] == told[1]
    assert len(rows[0]) == 2


def test_a_verb_that_one_process_does_says_so_and_so_does_a_wrong_word(ranks):
    for rank, (status, said) in enumerate(ranks.told["train 2"]):
        assert status == 2
        assert f"corda-vlm (rank {rank}): started in 2 processes, and train runs in one" in said
    for status, said in ranks.told["wrong 2"]:
        assert status == 2
        assert "rank" in said


def test_the_commands_of_the_page_are_of_verbs_that_several_processes_do():
    page = asset("docs") / "pages" / "how-to" / "processes.md"
    lines = re.findall(r"^torchrun --nproc-per-node 4 -m corda_vlm (.*)$", page.read_text(), re.M)
    assert len(lines) == 3
    for line in lines:
        verb, *words = shlex.split(line)
        assert verb in TOGETHER
        assert Command(verb, VERBS[verb]).read(words)["model"]
