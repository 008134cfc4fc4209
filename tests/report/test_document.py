"""A report's content as Markdown and as a page: in which order, what is folded, and what a table says to a reader."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from PIL import Image

from corda_vlm.report.document import Picture, Report, Section, Table, markdown, page
from corda_vlm.report.markup import bold, code

TABLE = Table("What is in it.", ["method", "kept"], [["lora", bold("20%")], ["a|b", code("x|y")]])


@pytest.fixture
def report(tmp_path: Path) -> Report:
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "a picture.png")
    picture = Picture(tmp_path / "a picture.png", 'A "square"', "It is small.")
    sections = [
        Section("First", ["Some <words>."], [picture], [TABLE]),
        Section("Second", tables=[Table("", ["", ""], [["key", "value"]])], folded=True),
    ]
    return Report("Title & more", ["Lead."], sections)


def test_markdown_has_paragraphs_pictures_and_tables_in_this_order(report, tmp_path) -> None:
    assert markdown(report, tmp_path) == (
        "# Title & more\n\nLead.\n\n## First\n\nSome \\<words>.\n\n"
        '![A "square"](a%20picture.png)\n\nIt is small.\n\n'
        "What is in it.\n\n| method | kept |\n|---|---:|\n| lora | **20%** |\n| a\\|b | `x\\|y` |\n\n"
        "## Second\n\n|  |  |\n|---|---:|\n| key | value |\n"
    )


def test_a_page_holds_its_pictures_and_folds_what_only_some_want(report, tmp_path) -> None:
    text = page(report)
    data = base64.b64encode((tmp_path / "a picture.png").read_bytes()).decode()
    assert f'src="data:image/png;base64,{data}" alt="A &quot;square&quot;"' in text
    assert "<title>Title &amp; more</title>" in text
    assert '<section>\n<h2 id="section-1">First</h2>\n<p>Some &lt;words&gt;.</p>\n<figure>' in text
    assert '<details>\n<summary><h2 id="section-2">Second</h2></summary>' in text
    assert text.count("<section>") == text.count("<details>") == 1


def test_a_table_is_named_by_its_caption_and_has_a_head_where_it_has_headings(report) -> None:
    text = page(report)
    assert '<p class="about" id="table-1">What is in it.</p>' in text
    assert '<table aria-labelledby="table-1"><thead><tr><th scope="col">method</th>' in text
    assert '<th scope="row">lora</th><td><strong>20%</strong></td>' in text
    assert '<table aria-label="table" class="prose"><tbody>\n<tr><th scope="row">key</th>' in text


def test_a_page_has_contents_and_leaves_out_what_is_empty(report, tmp_path) -> None:
    assert "<nav" not in page(report), "two sections need no list"
    empty = [Section("Nothing"), Section("No rows", tables=[Table("About", ["a", "b"], [])])]
    longer = Report("Title", [], [*report.sections, *empty, Section("<Last>", ["Words."])])
    text = page(longer)
    assert '<li><a href="#section-3">&lt;Last&gt;</a></li>' in text
    assert '<h2 id="section-3">&lt;Last&gt;</h2>' in text
    for written in (text, markdown(longer, tmp_path)):
        assert "Nothing" not in written
        assert "No rows" not in written


def test_rows_of_methods_can_be_filtered_but_for_the_base_model() -> None:
    rows = [["base", "1"], ["lora", "2"], ["lora, scaled", "3"], ['"x" & y', "4"]]
    text = page(Report("", [], [Section("s", tables=[Table("", ["method", "kept"], rows)])]))
    assert '<tr><th scope="row">base</th>' in text
    assert text.count('<tr data-method="lora">') == 2
    assert '<tr data-method="&quot;x&quot; &amp; y">' in text


def test_a_page_asks_nothing_of_the_network(report) -> None:
    text = page(report)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert "url(" not in text
    assert "@import" not in text
    assert "fetch(" not in text


def test_a_live_picture_stands_in_place_of_its_file(tmp_path) -> None:
    picture = Picture(tmp_path / "a.png", "alt", "caption", live="<svg></svg>")
    report = Report("", [], [Section("s", pictures=[picture])])
    assert "<figure><svg></svg><figcaption>caption</figcaption></figure>" in page(report)
    assert "](a.png)" in markdown(report, tmp_path)
