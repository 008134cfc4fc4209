"""Tables of separated values, as open_clip's trainings have them, are read as what they say or refused by line."""

from __future__ import annotations

import pytest

from corda_vlm.data import load_records
from corda_vlm.errors import DataError, UnknownNameError


@pytest.fixture
def read(tmp_path, digits):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(digits[index][0])

    def load(content, kind="csv", name="train.csv", **options):
        (tmp_path / name).write_text(content, encoding="utf-8")
        return load_records({"source": f"{kind}:{tmp_path / name}", **options})

    return load


def test_open_clips_table_of_pictures_and_captions(read, tmp_path, monkeypatch):
    monkeypatch.chdir("/")  # paths are relative to the file, not to where one stands
    text = 'filepath\ttitle\n0.png\ta zero, round\n1.png\t"a ""one"""\n\n2.png\ta\u2028two\n'
    for kind, options in (("tsv", {}), ("csv", {"separator": "\t"})):
        data = read(text, kind, **options)
        assert data.texts == ["a zero, round", 'a "one"', "a\u2028two"]
        assert [record["image"].size for record in data] == [(8, 8)] * 3
    assert data.place(2) == f"{tmp_path / 'train.csv'}, line 5"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "t.tsv").write_text(text)
    source = f"tsv:{tmp_path}/elsewhere/t.tsv"
    assert len(list(load_records({"source": source, "root": str(tmp_path)}))) == 3


def test_columns_of_other_names(read):
    data = read("id;pic;says\n7;0.png;zero\n8;1.png;one\n", separator=";", image="pic", text="says")
    assert data.texts == ["zero", "one"]
    assert data[1]["id"] == 8
    with pytest.raises(UnknownNameError, match=r"text column of .* 'sais'; .*Did you mean 'says'"):
        read("id;pic;says\n7;0.png;zero\n", separator=";", text="sais")


def test_columns_of_numbers_are_numbers_but_for_texts(read):
    text = "filepath,title,label,fold,code\n0.png,1984,10,1,007\n1.png,1985,2,2,008\n2.png,1986,0,1,009\n"
    data = read(text, where={"fold": 1})
    assert data.labels == [10, 0], "by number, not by letter"
    assert data.texts == ["1984", "1986"]
    assert data[0]["code"] == "007"
    asked = read("question,answer\n3+4?,7\n5,6\n", format="qa")
    assert [record["answers"] for record in asked] == [["7"], ["6"]]
    assert asked[1]["question"] == "5"
    assert len(read(text, rows=[1, 3])) == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("filepath\ttitle\n0.png\ta\n", r"one column, 'filepath\\ttitle'; write tsv: in place of"),
        ("filepath;title\n0.png;a\n", r"give separator: ';'"),
        ("filepath,title\n0.png,a,b\n", r"line 2: has 3 cells, and there are 2 columns; put cells"),
        ("filepath,title\n0.png\n", r"line 2: has 1 cells"),
        ('filepath,title\n0.png,"a\n1.png,b\n', r"not a line of separated values"),
        ("title,title\na,b\n", r"has the column 'title' twice"),
        ("", r"holds no record; its first line must name the columns"),
        ("filepath,title\n", r"holds no record"),
        ("filepath,title\n0.png,\n", r"line 2: title is None, which is no text"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_by_line(read, text, why):
    with pytest.raises(DataError, match=why):
        read(text)


@pytest.mark.parametrize("separator", ["", ",,", "\n", '"'])
def test_a_separator_is_one_character(read, separator):
    with pytest.raises(DataError, match="separator is"):
        read("a,b\n", separator=separator)
    with pytest.raises(DataError, match="it is for csv"):
        load_records({"source": "jsonl:a.jsonl", "separator": ";"})
