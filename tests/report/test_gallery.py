"""The gallery of what was gained and lost: which examples, with which pictures, and what is said where there are none."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from corda_vlm.__main__ import main
from corda_vlm.data import load_records
from corda_vlm.errors import ForeignFileError
from corda_vlm.evaluation.predictions import records_told
from corda_vlm.jsonl import append_jsonl
from corda_vlm.report import gallery
from corda_vlm.report.document import Report, markdown, page
from corda_vlm.report.gallery import SHOWN, gallery_sections, thumbnail
from corda_vlm.report.write import write_report
from tests.report.invented import DEMO, study, write_run


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Any]:
    """Two classes of twenty pictures; what a file of predictions tells of them."""
    for number in range(40):
        file = tmp_path / "data" / ("dark" if number < 20 else "light") / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 6 * number).save(file)
    return records_told(load_records(f"folder:{tmp_path / 'data'}"), None)


def said(
    file: Path, method: str, right: Sequence[int], records: Any = None, count: int = 40, **more: Any
) -> Path:
    """Predictions of a model that is right on the examples in `right` alone."""
    rows = []
    for index in range(count):
        names = ("dark", "light") if index < 20 else ("light", "dark")
        rows.append(
            {"task": "shades", "method": method, "index": index, "place": f"row {index}", "metric": "top1",
             "said": names[index not in right], "right": [names[0]], "correct": int(index in right),
             **({} if records is None else {"records": records}), **more}
        )  # fmt: skip
    append_jsonl(file, rows, "prediction")
    return file


def test_examples_are_spread_over_the_data_and_carry_their_own_picture(tmp_path, pictures) -> None:
    base = said(tmp_path / "base.jsonl", "base", range(20), pictures)
    after = said(tmp_path / "lora.jsonl", "lora", range(10, 30), pictures)
    (section,) = gallery_sections(tmp_path, [after, base])
    assert section.heading == "Examples that lora gained and lost"
    assert "of 40 examples 10 were wrong before and are right now, 10 the other way round" in section.paragraphs[0]  # fmt: skip
    gained, lost = section.galleries
    assert [len(gained.tiles), len(lost.tiles)] == [SHOWN, SHOWN]
    numbers = [int(tile.place.removeprefix("row ")) for tile in gained.tiles]
    assert (numbers[0], numbers[-1]) == (20, 29), "from the first to the last of them"
    assert numbers == sorted(set(numbers))
    for number, tile in zip(numbers, gained.tiles, strict=True):
        assert list(tile.lines) == [("base", "dark", False), ("lora", "light", True), ("right answer", "light", None)]  # fmt: skip
        assert tile.image is not None
        assert Image.open(io.BytesIO(tile.image)).getpixel((0, 0)) == (6 * number,) * 3
    assert list(lost.tiles[0].lines)[:2] == [("base", "dark", True), ("lora", "light", False)]
    assert (tmp_path / "gallery-1-1.png").is_file()
    report = Report("Title", [], [section])
    assert "![Pictures that were gained on shades: dark became light" in markdown(report, tmp_path)
    html = page(report)
    assert html.count("<li ") == 2 * SHOWN
    assert "gallery-1-1.png" not in html, "the page shows the tiles themselves"


def test_a_run_shows_what_lies_in_its_folder(tmp_path, pictures) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, study(DEMO))
    said(folder / "predictions.jsonl", "base", [0], pictures)
    said(folder / "predictions.jsonl", "lora", [1], pictures, learning_rate=0.1)
    html = write_report(folder).read_text()
    assert html.count("<li ") == 2
    assert "gallery-1-1.png" in (folder / "report.md").read_text()


def test_where_there_are_no_predictions_nothing_is_invented(tmp_path, pictures) -> None:
    assert gallery_sections(tmp_path) == []
    one = said(tmp_path / "one.jsonl", "base", [1], pictures)
    assert gallery_sections(tmp_path, [one]) == [], "a single model gained nothing"
    other = said(tmp_path / "other.jsonl", "lora", [1], {**pictures, "fingerprint": "else"})
    assert gallery_sections(tmp_path, [one, other]) == [], "measured on other records"
    same = said(tmp_path / "same.jsonl", "lora", [1], pictures)
    (section,) = gallery_sections(tmp_path, [one, same])
    assert not section.galleries
    assert "0 were wrong before and are right now, 0 the other way round" in section.paragraphs[0]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(ForeignFileError, match="is not a prediction"):
        gallery_sections(tmp_path, [bad])


def test_pictures_that_changed_are_not_shown(tmp_path, pictures) -> None:
    base = said(tmp_path / "base.jsonl", "base", [0], pictures)
    after = said(tmp_path / "lora.jsonl", "lora", [1], pictures)
    Image.new("L", (8, 8), 255).save(tmp_path / "data" / "dark" / "00.png")
    (section,) = gallery_sections(tmp_path, [base, after])
    assert all(tile.image is None for gallery in section.galleries for tile in gallery.tiles)
    assert "data has changed" in section.paragraphs[-1]


def test_no_hub_is_asked_for_pictures(tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(gallery, "load_records", lambda *given, **_: asked.append(given))
    records = {"spec": {"source": "hf:owner/name"}, "beside": None, "fingerprint": "f"}
    base = said(tmp_path / "base.jsonl", "base", [0], records)
    after = said(tmp_path / "lora.jsonl", "lora", [1], records)
    (section,) = gallery_sections(tmp_path, [base, after])
    assert not asked
    assert "The pictures of shades are not shown" in section.paragraphs[-1]


def test_questions_without_pictures_are_a_table_in_markdown(tmp_path) -> None:
    asked = {"question": "Who wrote <it> | and why?"}
    base = said(tmp_path / "base.jsonl", "base", [0], count=2, **asked)
    after = said(tmp_path / "lora.jsonl", "lora", [1], count=2, scale=0.5, **asked)
    (section,) = gallery_sections(tmp_path, [base, after])
    text = markdown(Report("Title", [], [section]), tmp_path)
    assert "| question | base | lora, scale 0.5 | right answer |" in text
    assert "| Who wrote \\<it> \\| and why? | light | dark | dark |" in text
    html = page(Report("Title", [], [section]))
    assert "<p>Who wrote &lt;it&gt; | and why?</p>" in html
    assert re.search(r'<div class="wrong"><span>base</span> light<b aria-label="wrong">', html)


@pytest.mark.parametrize(("size", "shown"), [((8, 4), (144, 72)), ((100, 50), (100, 50)), ((900, 300), (144, 48))])  # fmt: skip
def test_thumbnails_enlarge_what_is_tiny_and_shrink_what_is_large(size, shown) -> None:
    assert Image.open(io.BytesIO(thumbnail(Image.new("RGB", size, (9, 90, 200))))).size == shown


def test_a_report_names_the_file_that_is_missing(tmp_path, capsys) -> None:
    write_run(tmp_path, study(DEMO))
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--predictions", str(tmp_path / "none.jsonl")])
    assert "none.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()
