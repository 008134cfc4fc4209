"""The verb report with --before and --after, on scores of our own: what it writes, and what it refuses."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from corda_vlm.__main__ import main
from corda_vlm.errors import CordaError
from corda_vlm.evaluation.score_file import append_rows
from corda_vlm.report import BeforeAfterOptions, write_comparison
from tests.report.invented import BASE as BASE_SCORES
from tests.report.invented import at, rows_of


@pytest.fixture
def scores(tmp_path):
    """A file of scores of a model before training and of two after."""
    path = tmp_path / "measured.jsonl"
    rows = rows_of("base", BASE_SCORES) + rows_of("lora", at(0.8, 0.5))
    tight = [
        {**row, "gain": row["value"] - BASE_SCORES[row["task"]]}
        for row in rows_of("corda", at(0.8, 0.9))
    ]
    tight = [
        {**row, "gain_low": row["gain"] - 0.01, "gain_high": row["gain"] + 0.01} for row in tight
    ]
    append_rows(path, rows + tight)
    return path


@pytest.mark.unchecked
def test_the_command_writes_a_report_a_page_a_picture_and_a_card(scores, tmp_path, capsys):
    output = tmp_path / "out"
    main(["report", "--before", str(scores), "--after", str(scores), "--output", str(output)])
    printed = capsys.readouterr().out
    assert "corda keeps 90.0% (" in printed
    assert "lora keeps 50.0% (" in printed
    assert f"wrote {output / 'report.html'}" in printed
    assert sorted(path.name for path in output.iterdir()) == [
        "card.json", "change.png", "report.html", "report.md"
    ]  # fmt: skip
    report = (output / "report.md").read_text(encoding="utf-8")
    assert "| lora | 10.0% → 80.0% | 50.0% (" in report
    assert "![" in report
    assert "Unpaired:" in report
    assert "Paired by the run itself:" in report
    page = (output / "report.html").read_text(encoding="utf-8")
    HTMLParser().feed(page)
    assert 'src="data:image/png;base64,' in page
    card = json.loads((output / "card.json").read_text(encoding="utf-8"))
    corda = next(one for one in card["after"] if one["name"] == "corda")
    assert corda["kept_share"]["value"] == pytest.approx(0.9)
    assert corda["kept_share"]["low"] < 0.9 < corda["kept_share"]["high"]
    assert [(one["task"], one["role"]) for one in corda["tasks"]] == [
        ("new", "gain"), ("old", "retention"), ("older", "retention")
    ]  # fmt: skip


def test_roles_are_read_from_yaml_and_options_go_before(scores, tmp_path):
    roles = tmp_path / "roles.yaml"
    roles.write_text("gain: [older]\nretention: [old]\nchance: {old: 0.1}\n")
    given = BeforeAfterOptions(
        before=[str(scores)], after=[str(scores)], roles=str(roles), gain=["new"]
    )
    merged = given.with_file()
    assert (merged.gain, merged.retention, merged.chance) == (["new"], ["old"], {"old": 0.1})
    with pytest.raises(CordaError, match="gane"):
        roles.write_text("gane: [older]\n")
        given.with_file()
    with pytest.raises(CordaError, match="must hold a mapping"):
        roles.write_text("- older\n")
        given.with_file()


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--before", "{scores}"], "--after is missing"),
        (["--after", "{scores}"], "--before is missing"),
        (["runs/demo", "--before", "{scores}", "--after", "{scores}"], "one word too many"),
        ([], "needs FOLDER"),
        (["--before", "nothing", "--after", "{scores}"], "no results at nothing"),
        (["--before", "{scores}", "--after", "{empty}"], "lm-eval (results_DATE.json"),
        (["--before", "{scores}", "--after", "{scores}", "--gain", "nw"], "Did you mean 'new'"),
        (["--before", "{scores}", "--after", "={scores}"], "neither a path nor NAME=PATH"),
        (["--before", "{scores}", "--after", "{scores}", "--output", "{run}"], "give another with --output"),
        (["--before", "{trained}", "--after", "{scores}"], "holds the results of 2 models: 'lora' and 'corda'"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_says_why(scores, tmp_path, capsys, words, expected):
    places = {
        "scores": scores,
        "empty": tmp_path / "empty",
        "run": tmp_path / "run",
        "trained": tmp_path / "t.jsonl",
    }
    places["empty"].mkdir()
    (places["empty"] / "notes.txt").write_text("nothing\n")
    places["run"].mkdir()
    (places["run"] / "scores.jsonl").write_bytes(scores.read_bytes())
    lines = scores.read_text().splitlines()
    places["trained"].write_text("\n".join(line for line in lines if '"base"' not in line) + "\n")
    with pytest.raises(SystemExit) as status:
        main(["report", *(word.format(**places) for word in words)])
    assert status.value.code == 2
    assert expected in capsys.readouterr().err


def test_many_models_have_one_sentence(scores, tmp_path):
    more = [row for n in range(5) for row in rows_of(f"m{n}", at(0.7, 0.1 * n))]
    append_rows(scores, more)
    _, summary = write_comparison(
        BeforeAfterOptions(before=[str(scores)], after=[str(scores)], output=str(tmp_path / "out"))
    )
    assert "Of 7 models corda keeps 90.0%" in summary
    assert "m3 keeps" not in summary
