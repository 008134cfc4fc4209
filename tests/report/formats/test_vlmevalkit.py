"""VLMEvalKit's tables, written as its own code writes them (pandas with xlsxwriter, or csv and tsv in quotes)."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import pytest

from corda_vlm.errors import ForeignFileError
from corda_vlm.report.formats.registry import read_results
from corda_vlm.report.formats.vlmevalkit import read_table
from corda_vlm.report.formats.xlsx import read_xlsx

HITS = [
    ("2", "What is shown?", "A", 1),
    ("5", 'How many, "exactly"?', "B", 0),
    ("9", "Where\nis it?", "C", 1),
]
SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"


def quoted(rows: list[tuple], separator: str) -> str:
    """As pandas writes it with QUOTE_ALL."""
    lines = [
        separator.join(f'"{str(cell).replace(chr(34), 2 * chr(34))}"' for cell in row)
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def write_xlsx(path: Path, rows: list[tuple]) -> None:
    """Texts in the shared strings, numbers in place, an empty cell left out: what xlsxwriter writes."""
    shared: list[str] = []
    lines = []
    for number, row in enumerate(rows, start=1):
        cells = []
        for place, value in enumerate(row):
            name = f"{chr(ord('A') + place)}{number}"
            if isinstance(value, str) and value:
                shared += [value] if value not in shared else []
                cells.append(f'<c r="{name}" t="s"><v>{shared.index(value)}</v></c>')
            elif value != "":
                cells.append(f'<c r="{name}"><v>{value}</v></c>')
        lines.append(f'<row r="{number}">{"".join(cells)}</row>')
    texts = "".join(
        f"<si><t>{text.replace('&', '&amp;').replace('<', '&lt;')}</t></si>" for text in shared
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr(
            "xl/worksheets/sheet1.xml",
            f'<worksheet xmlns="{SHEET}"><sheetData>{"".join(lines)}</sheetData></worksheet>',
        )
        archive.writestr("xl/sharedStrings.xml", f'<sst xmlns="{SHEET}">{texts}</sst>')


@pytest.fixture
def run(tmp_path):
    """The folder of one run: multiple choice in .xlsx, yes or no in .tsv, short answers in .json, and a judge's scores."""
    folder = tmp_path / "out" / "llava" / "T20260801-120000"
    folder.mkdir(parents=True)
    heading = ("index", "question", "prediction", "hit")
    write_xlsx(folder / "llava_MMBench_DEV_EN_openai_result.xlsx", [heading, *HITS])
    (folder / "llava_MMBench_DEV_EN_acc.csv").write_text(
        quoted([("split", "Overall", "AR"), ("none", 2 / 3, 0.5)], ",")
    )
    yes = [
        ("index", "question", "answer", "extracted", "score"),
        (1, "a", "yes", "yes", True),
        (2, "b", "no", "yes", False),
    ]
    (folder / "llava_POPE_auxmatch.tsv").write_text(quoted(yes, "\t"))
    (folder / "llava_POPE_score.csv").write_text(
        quoted([("split", "Overall", "acc"), ("Overall", 66.6, 50.0)], ",")
    )
    short = [
        {"index": n, "question": "q", "eval_score": score} for n, score in ((1, 1.0), (2, 0.3))
    ]
    (folder / "llava_ChartQA_TEST_results.json").write_text(json.dumps(short))
    (folder / "llava_ChartQA_TEST_acc.csv").write_text(
        quoted([("Overall", "human"), (65.0, 65.0)], ",")
    )
    (folder / "llava_MMVet_gpt-4-turbo_score.csv").write_text(
        quoted([("Category", "tot", "Overall"), ("all", 218, 31.5)], ",")
    )
    (folder / "status.json").write_text("{}")
    return folder


def test_each_kind_of_table(run):
    (model,) = read_results(run.parent.parent)
    assert (model.name, model.tools) == ("llava", ("VLMEvalKit",))
    assert set(model.tasks) == {"MMBench_DEV_EN", "POPE", "ChartQA_TEST", "MMVet_gpt-4-turbo"}
    choice = model.of("MMBench_DEV_EN")
    assert (choice.value, choice.n, choice.chance) == (pytest.approx(2 / 3), 3, None)
    assert choice.samples.ids == ("2", "5", "9")
    assert choice.samples.documents[1] == 'How many, "exactly"?'
    short = model.of("ChartQA_TEST")
    assert (short.value, short.samples.outcome.values.tolist()) == (pytest.approx(0.65), [1.0, 0.3])
    judged = model.of("MMVet_gpt-4-turbo")
    assert (judged.value, judged.samples, judged.is_share) == (pytest.approx(0.315), None, True)


def test_a_score_that_is_no_mean_of_samples_has_none(run):
    """POPE's is the F1 of all answers."""
    (model,) = read_results(run)
    pope = model.of("POPE")
    assert (pope.value, pope.samples) == (pytest.approx(0.666), None)


def test_of_two_runs_the_last_counts(run):
    later = run.with_name("T20260802-120000")
    later.mkdir()
    heading = ("index", "question", "prediction", "hit")
    write_xlsx(
        later / "llava_MMBench_DEV_EN_openai_result.xlsx",
        [heading, *((*row[:3], 1) for row in HITS)],
    )
    (model,) = read_results(run.parent)
    assert model.of("MMBench_DEV_EN").value == 1.0
    assert model.of("ChartQA_TEST").value == pytest.approx(0.65)


@pytest.mark.parametrize("kind", ["xlsx", "tsv", "csv", "json"])
def test_a_table_is_the_same_in_each_format(tmp_path, kind):
    path = tmp_path / f"table.{kind}"
    rows = [("index", "answer", "hit"), (1, "", 1), (2, "a & <b>", 0)]
    if kind == "xlsx":
        write_xlsx(path, rows)
    elif kind == "json":
        path.write_text(json.dumps([dict(zip(rows[0], row, strict=True)) for row in rows[1:]]))
    else:
        path.write_text(quoted(rows, "\t" if kind == "tsv" else ","))
    assert read_table(path) == {"index": ["1", "2"], "answer": ["", "a & <b>"], "hit": ["1", "0"]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no .xlsx file, or a truncated one"),
        (b"PK\x03\x04 half of it", "no .xlsx file, or a truncated one"),
    ],
)
def test_a_damaged_spreadsheet(tmp_path, content, expected):
    path = tmp_path / "t.xlsx"
    path.write_bytes(content)
    with pytest.raises(ForeignFileError, match=expected):
        read_xlsx(path)


@pytest.mark.parametrize("place", ["flags", "content", "method"])
def test_a_spreadsheet_that_is_encrypted_or_packed_otherwise(tmp_path, place):
    path = tmp_path / "t.xlsx"
    write_xlsx(path, [("index", "hit"), *((number, 1) for number in range(99))])
    content = bytearray(path.read_bytes())
    name = b"xl/worksheets/sheet1.xml"
    local, central = content.find(name), content.rfind(name)
    if place == "flags":
        content[local - 24] |= 1
        content[central - 38] |= 1
    elif place == "method":
        content[local - 22], content[central - 36] = 99, 99
    else:
        content[local + len(name) : local + len(name) + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(ForeignFileError, match=r"no \.xlsx file, or a truncated one"):
        read_xlsx(path)


def test_a_long_answer_is_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(quoted([("index", "prediction"), (1, "x" * 140_000)], ","))
    assert read_table(path)["prediction"] == ["x" * 140_000]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", "index,hit\n1,1\n2", "the row that begins with '2' has 1 cells, and there are 2 headings"),
        ("t.tsv", "index\thit\n1\t1\t1\n", "has 3 cells, and there are 2 headings"),
        ("t.json", '{"index": [1, 2], "hit": [1]}', "columns of several lengths"),
    ],
)  # fmt: skip
def test_rows_of_several_lengths_are_refused(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(ForeignFileError, match=expected):
        read_table(tmp_path / name)


def test_a_table_that_csv_cannot_part(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise csv.Error("line contains NUL")

    monkeypatch.setattr(csv, "reader", fail)
    (tmp_path / "t.csv").write_text("index,hit\n")
    with pytest.raises(ForeignFileError, match=r"is no table \(line contains NUL"):
        read_table(tmp_path / "t.csv")


def test_entities_are_not_expanded(tmp_path):
    path = tmp_path / "t.xlsx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", '<!DOCTYPE a [<!ENTITY b "c">]><worksheet/>')
    with pytest.raises(ForeignFileError, match="declares XML entities"):
        read_xlsx(path)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [("index", "question", "right")],
            "no columns index and hit; it has index, question, right",
        ),
        ([("index", "hit"), (1, "Z")], "hit of the sample 1 is 'Z', and should be a number"),
        ([("index", "hit"), (1, 1), (1, 0)], "holds the sample 1 twice"),
        ([("index", "hit")], "holds no sample"),
        ([], "is empty"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path, rows, expected):
    folder = tmp_path / "llava"
    folder.mkdir()
    (folder / "llava_AI2D_TEST_openai_result.tsv").write_text(quoted(rows, "\t") if rows else "")
    with pytest.raises(ForeignFileError, match=expected):
        read_results(folder)
