"""The report: complete, self-contained, and honest while a run is still going. All numbers are invented."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from corda_vlm.errors import ForeignFileError
from corda_vlm.report import Results, leading_finding, summary_table, write_report
from corda_vlm.report.document import Picture
from corda_vlm.report.plots.style import styles


class Outline(HTMLParser):
    """What a page is made of, and that its tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def run_dir(invented: Any, tmp_path: Path) -> Path:
    return invented.write_run(tmp_path / "demo", invented.study(invented.DEMO), histories=True)


def test_everything_is_written(run_dir: Path) -> None:
    assert write_report(run_dir) == run_dir / "report.html"
    for name in ("tradeoff.png", "training.png"):
        with Image.open(run_dir / name) as picture:
            assert min(picture.size) > 400
    text = (run_dir / "report.md").read_text()
    assert text.startswith("# Invented run\n")
    assert "![" in text
    assert "](tradeoff.png)" in text
    assert (
        "**corda-kpm** keeps 43.0% of what the model knew and lora keeps 20.0%, 2.15 times as much"
        in text
    )
    assert "| corda-kpm | 0.002 | 76.0% (75.5 to 76.5) |" in text
    assert "| old | retention | top1 | 44.0% (42.0 to 46.0) | 4.00% | 500 |" in text
    assert "flatters it slightly" in text, "no validation split here, and it says so"
    assert "corda-vlm run <demo> & more" in text
    assert not list(run_dir.glob(".*partial"))


def test_the_page_needs_nothing_else(run_dir: Path) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Outline(text)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#section-)""", text)
    assert "url(" not in text
    assert "@import" not in text
    assert "corda-vlm run &lt;demo&gt; &amp; more" in text
    assert page.all("html")[0]["lang"] == "en"
    pictures = page.all("img")
    assert len(pictures) == 1, "the losses; the trade-off is drawn in the page itself"
    plots = [a for a in page.all("svg") if a.get("role") == "img"]
    assert [len(a["aria-label"] or "") > 40 for a in plots] == [True]
    for picture in pictures:
        assert picture["src"].startswith("data:image/png;base64,")  # type: ignore[union-attr]
        assert len(picture["alt"] or "") > 40
        assert "**" not in (picture["alt"] or "")
    assert len(page.all("h1")) == 1
    assert {a.get("scope") for a in page.all("th")} == {"row", "col"}
    ids = {a["id"] for a in page.all("p") if "id" in a}
    assert {a["aria-labelledby"] for a in page.all("table") if "aria-labelledby" in a} == ids


def test_the_terminals_table(run_dir: Path) -> None:
    text = summary_table(run_dir)
    assert max(map(len, text.splitlines())) < 160
    lines = text.splitlines()
    assert next(line.split() for line in lines if line.startswith("base"))[-1] == "100.0%"
    assert next(line.split() for line in lines if line.startswith("lora"))[:3] == [
        "lora",
        "0.001",
        "52.0%",
    ]
    assert "kept at task 80.0%" in text
    assert "2.15 times as much." in text
    assert "**" not in text


def test_a_report_of_a_run_in_progress(invented: Any, tmp_path: Path) -> None:
    base = invented.rows_of("base", invented.BASE)
    run = invented.write_run(tmp_path / "base", base)
    write_report(run)
    assert "Only the model before training" in (run / "report.md").read_text()
    assert not (run / "tradeoff.png").exists()
    assert "44.0%" in summary_table(run)

    run = invented.write_run(
        tmp_path / "half", [*base, *invented.rows_of("full", {"new": 0.5}, rate=1e-4)]
    )
    write_report(run)
    assert "| full | 0.0001 | 50.0% | – | – | – |" in (run / "report.md").read_text()

    run = invented.write_run(tmp_path / "alone", invented.study({"full": invented.DEMO["full"]}))
    write_report(run)
    assert "Nothing was trained with `lora`" in (run / "report.md").read_text()
    assert (run / "tradeoff.png").exists()
    summary_table(run)


def test_scaled_models_and_more_pictures(invented: Any, tmp_path: Path) -> None:
    rows = invented.study(invented.DEMO)
    for rate, _, _ in invented.DEMO["lora"]:
        rows += invented.rows_of("lora", invented.at(0.4, 0.9), rate=rate, seed=0, scale=0.5)
    run = invented.write_run(tmp_path / "scaled", rows)
    Image.new("RGB", (20, 20)).save(run / "ranks.png")
    write_report(run, pictures=[Picture(run / "ranks.png", "Ranks over layers", "Ranks")])
    text = (run / "report.md").read_text()
    assert "| lora, scaled |" in text
    assert "## Scaled after training" in text
    assert "![Ranks over layers](ranks.png)" in text
    assert len(Outline((run / "report.html").read_text()).all("details")) == 2


def test_a_large_study_has_what_matters_first(invented: Any, tmp_path: Path) -> None:
    methods = ("lora", "corda-kpm", "dora", "full", "lora-anchor", "linear-probe")
    run = invented.write_run(tmp_path / "large", invented.large_study(methods, seeds=2))
    write_report(run)
    text = (run / "report.md").read_text()
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings[:4] == [
        "What was kept at equal task accuracy",
        "Against lora scaled after training",
        "One model of each method, chosen on validation data",
        "What the forecast of forgetting foretold",
    ]
    lead = text[: text.index("## ")]
    assert "At 0.95 of lora's best task accuracy" in lead
    assert "Against lora scaled after training, **lora-anchor, scaled** keeps +" in lead
    assert "forecast.png" in text
    # of many methods only the curves with scales are in the first table, the others are folded
    first = text[text.index("| method |") : text.index("## Against")]
    curves = [line.split(" | ")[0][2:] for line in first.splitlines()[2:] if line]
    assert curves[:2] == ["lora-anchor, scaled", "corda-kpm, scaled"]
    assert sorted(curves) == sorted([*(f"{method}, scaled" for method in methods), "lora"])
    page = (run / "report.html").read_text()
    closed = page[page.index("<details>") :]
    assert "Every method at every learning rate" in closed
    assert "Against lora" not in closed
    with Image.open(run / "tradeoff.png") as picture:
        assert picture.size[0] > 1200, "a panel for each"
        edge = picture.convert("L").crop((picture.width - 4, 0, picture.width, 100))
        assert np.asarray(edge).min() > 200, "the words above end before the picture does"
    assert len(summary_table(run).splitlines()) < 30


def test_steps_to_a_loss(run_dir: Path) -> None:
    write_report(run_dir)
    text = (run_dir / "report.md").read_text()
    table = text[text.index("## Steps to lora's final loss") :]
    # full ends at a smaller rate, so higher
    assert "| lora | 0.004 | 1" in table
    assert "| full | 0.001 | not reached | never | – |" in table


def test_the_finding_alone(invented: Any) -> None:
    told = leading_finding(Results.of(invented.study(invented.DEMO)))
    assert "**corda-kpm** keeps 43.0%" in told
    alone = Results.of(invented.rows_of("base", invented.BASE))
    assert leading_finding(alone).startswith("Only the model before training")


def test_one_seed_and_no_description(invented: Any, tmp_path: Path) -> None:
    run = invented.write_run(tmp_path / "one", invented.study(invented.DEMO, seeds=1))
    (run / "run.json").unlink()
    write_report(run)
    text = (run / "report.md").read_text()
    assert text.startswith("# one\n")
    assert "Means over one seed." in text
    assert "| lora | 20.0% | 1.00 |" in text, "no interval from one seed"


def test_what_is_no_run(invented: Any, tmp_path: Path) -> None:
    with pytest.raises(ForeignFileError, match="no scores at"):
        write_report(tmp_path)
    (tmp_path / "scores.jsonl").write_text("")
    with pytest.raises(ForeignFileError, match="holds no score yet"):
        write_report(tmp_path)
    invented.write_run(tmp_path, invented.rows_of("base", invented.BASE))
    (tmp_path / "run.json").write_text(json.dumps(["no", "mapping"]))
    with pytest.raises(ForeignFileError, match="must hold a mapping"):
        write_report(tmp_path)


def test_a_history_that_cannot_be_read_is_left_out(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run_dir / "lora" / "0.001-0" / "history.jsonl").write_text("{torn")
    write_report(run_dir)
    assert "left out of the training curves" in caplog.text


def test_each_method_has_its_own_look() -> None:
    methods = ["full", "lora", "corda-kpm", *(f"method-{n}" for n in range(12))]
    found = styles(methods)
    assert len(set(found.values())) == len(methods)
    assert found["lora"] == styles(["lora"])["lora"]
    assert len({colour for colour, _ in list(found.values())[:12]}) == 12
