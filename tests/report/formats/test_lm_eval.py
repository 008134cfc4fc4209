"""lm-eval's files: those that its release 0.4.13 wrote, and changed copies of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from corda_vlm.errors import CordaError, DataError, ForeignFileError
from corda_vlm.report.before_after.comparison import compare_models
from corda_vlm.report.before_after.options import Roles
from corda_vlm.report.formats.registry import read_results
from tests.report.before_after.invented import interval

FILES = Path(__file__).with_name("lm_eval_files")
CAPITALS = "samples_capitals_"


@pytest.fixture
def results(tmp_path):
    """Makes a copy of the files, in which results and samples may be changed."""

    def make(name: str, right: list[int] | None = None, **changed) -> Path:
        folder = tmp_path / name
        shutil.copytree(FILES, folder)
        (file,) = folder.glob("results_*.json")
        content = json.loads(file.read_text()) | changed
        if right is not None:
            content["results"]["capitals"]["acc,none"] = sum(right) / len(right)
            (samples,) = folder.glob(f"{CAPITALS}*")
            rows = [json.loads(line) for line in samples.read_text().splitlines()]
            rows = [{**row, "acc": float(one)} for row, one in zip(rows, right, strict=True)]
            samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file.write_text(json.dumps(content))
        return folder

    return make


def test_what_lm_eval_wrote():
    (model,) = read_results(FILES)
    assert (model.name, model.tools, model.tasks) == ("before", ("lm-eval",), ("capitals", "sums"))
    capitals = model.of("capitals")
    assert (capitals.metric, capitals.n, capitals.value) == ("acc", 6, pytest.approx(1 / 6))
    assert capitals.chance == pytest.approx(1 / 6)  # of six answers each
    assert capitals.samples.ids == ("0", "1", "2", "3", "4", "5")
    assert len(set(capitals.samples.documents)) == 6
    assert capitals.low < capitals.value < capitals.high
    assert capitals.conditions == {"number of shots": "0", "version of the task": "1.0"}
    sums = model.of("sums")
    assert (sums.metric, sums.rises, sums.is_share, sums.samples) == (
        "perplexity",
        False,
        False,
        None,
    )


def test_two_of_them_pair_by_document(results):
    (before,) = read_results(results("before", [1, 1, 1, 1, 0, 0]))
    (after,) = read_results(results("after", [1, 1, 1, 0, 0, 0]))
    (one,) = compare_models(before, [after], Roles(retention=["capitals"]))
    (change,) = one.changes
    assert (change.how, change.guessed) == ("paired", False)
    assert interval(change.gain).value == pytest.approx(-1 / 6)
    assert interval(change.gain).high == 0.0  # five of the six are the same


def test_without_samples_the_standard_errors_make_an_interval(results):
    before, after = results("before", [1, 1, 1, 1, 0, 0]), results("after", [1, 1, 1, 0, 0, 0])
    for file in [*before.glob("samples_*"), *after.glob("samples_*")]:
        file.unlink()
    (first,), (second,) = read_results(before), read_results(after)
    (one,) = compare_models(first, [second], Roles(retention=["capitals"]))
    assert (one.changes[0].how, one.changes[0].guessed) == ("unpaired", True)


def test_a_file_of_samples_alone(results):
    (model,) = read_results(next(results("x").glob(f"{CAPITALS}*")))
    assert model.of("capitals").chance == pytest.approx(1 / 6)


def test_other_shots_and_other_documents_are_refused(results):
    (before,) = read_results(results("before", [1, 1, 1, 1, 0, 0]))
    (shots,) = read_results(results("shots", **{"n-shot": {"capitals": 5, "sums": 0}}))
    with pytest.raises(CordaError, match="the number of shots is 0 before and 5 after"):
        compare_models(before, [shots], Roles(retention=["capitals"]))
    folder = results("other")
    (file,) = folder.glob(f"{CAPITALS}*")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2]["doc_hash"] = "another"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (other,) = read_results(folder)
    with pytest.raises(DataError, match="'2' is of other data after than before"):
        compare_models(before, [other], Roles(retention=["capitals"]))


def test_a_group_with_a_score_of_its_own_is_one_task(results):
    folder = results("grouped")
    (file,) = folder.glob("results_*.json")
    content = json.loads(file.read_text())
    (samples,) = folder.glob(f"{CAPITALS}*")
    for name in ("eu", "asia"):
        shutil.copy(samples, samples.with_name(samples.name.replace("capitals", name)))
        for key in ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better"):
            content[key][name] = content[key]["capitals"]
    content["results"]["world"] = {"acc,none": 1 / 6, "acc_stderr,none": 0.1, "alias": "world"}
    content["group_subtasks"] = {"world": ["eu", "asia"], "tagged": ["sums"]}
    file.write_text(json.dumps(content))
    (model,) = read_results(folder)
    assert model.tasks == ("capitals", "sums", "world")
    world = model.of("world")
    assert (world.n, world.chance) == (12, pytest.approx(1 / 6))
    assert {"eu/0", "asia/0"} < set(world.samples.ids)


@pytest.mark.parametrize(
    "children", [["capitals", "capitals"], ["world", "world"], ["inner", "inner", "world"]]
)
def test_groups_that_hold_a_task_twice_or_each_other(results, children):
    folder = results("grouped")
    (file,) = folder.glob("results_*.json")
    content = json.loads(file.read_text())
    content["results"]["world"] = {"acc,none": 1 / 6, "acc_stderr,none": 0.1, "alias": "world"}
    content["group_subtasks"] = {"world": children, "inner": ["world", "world"]}
    file.write_text(json.dumps(content))
    (model,) = read_results(folder)
    assert "world" in model.tasks
    assert ("capitals" in model.tasks) == ("capitals" not in children)


def test_of_a_task_measured_twice_the_last_counts(results):
    folder = results("twice", [1, 1, 1, 1, 1, 1])
    for file in results("first", [0, 0, 0, 0, 0, 0]).glob("*20*"):
        date = file.name.partition("_2026")[2]
        shutil.copy(file, folder / file.name.replace(f"2026{date[:6]}", "2026-01-01"))
    (model,) = read_results(folder)
    assert model.of("capitals").value == 1.0


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "is empty"), ('{"results": {"capitals": {"acc,n', "may be truncated"), ('{"results": 3}', "no mapping `results`")],
)  # fmt: skip
def test_damaged_results(results, content, expected):
    folder = results("damaged")
    (file,) = folder.glob("results_*.json")
    file.write_text(content)
    with pytest.raises(ForeignFileError, match=expected) as error:
        read_results(folder)
    assert file.name in str(error.value)


def test_two_runs_in_one_file_of_samples(results):
    folder = results("appended")
    (file,) = folder.glob(f"{CAPITALS}*")
    file.write_text(file.read_text() * 2)
    with pytest.raises(ForeignFileError, match="holds the document 0 twice"):
        read_results(folder)
